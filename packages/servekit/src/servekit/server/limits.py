"""Every number that comes from outside has a limit; each limit has a default and a flag."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from common_platform.errors import ConfigError
from servekit.sampling import parameters
from servekit.sampling.structured.limits import GrammarLimits

MIB = 1 << 20
# Limits that the engine holds as well: the server's may be lower, never higher.
CEILINGS = {
    "max_n": parameters.MAX_N,
    "max_logprobs": parameters.MAX_LOGPROBS,
    "max_logit_bias": parameters.MAX_LOGIT_BIAS,
    "max_stop": parameters.MAX_STOP,
    "max_stop_chars": parameters.MAX_STOP_CHARS,
    "max_stop_token_ids": parameters.MAX_STOP_TOKEN_IDS,
    "max_json_depth": 200,  # what the parser can take
}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The most that a request, and all requests together, may ask for."""

    max_body_bytes: Annotated[int, Meta(description="bytes of a request body")] = 32 * MIB
    max_header_bytes: Annotated[int, Meta(description="bytes of a request line and its headers")] = 16_384
    header_timeout_s: Annotated[float, Meta(description="seconds for the headers to arrive")] = 10.0
    body_timeout_s: Annotated[float, Meta(description="seconds for the body to arrive")] = 30.0
    max_json_depth: Annotated[int, Meta(description="arrays and objects inside one another")] = 64
    max_json_nodes: Annotated[int, Meta(description="arrays, objects and strings of a body")] = 1_000_000
    max_streams: Annotated[int, Meta(description="streamed answers at once")] = 512
    max_queue: Annotated[int, Meta(description="requests that wait for a place in the batch")] = 1_024
    stream_stall_s: Annotated[float, Meta(description="seconds a caller may leave a stream unread")] = 30.0
    step_stall_s: Annotated[float, Meta(description="seconds a step may take before health fails")] = 30.0
    max_n: Annotated[int, Meta(description="n and best_of")] = CEILINGS["max_n"]
    max_prompts: Annotated[int, Meta(description="prompts of a request")] = 256
    max_seqs_per_request: Annotated[int, Meta(description="prompts times n")] = 256
    max_tokens_per_request: Annotated[int | None, Meta(description="n times max_tokens; 4 x the context")] = None
    max_logprobs: Annotated[int, Meta(description="logprobs, top_logprobs, prompt_logprobs")] = CEILINGS["max_logprobs"]
    max_logit_bias: Annotated[int, Meta(description="entries of logit_bias")] = CEILINGS["max_logit_bias"]
    max_stop: Annotated[int, Meta(description="stop strings")] = CEILINGS["max_stop"]
    max_stop_chars: Annotated[int, Meta(description="characters of a stop string")] = CEILINGS["max_stop_chars"]
    max_stop_token_ids: Annotated[int, Meta(description="stop token ids")] = CEILINGS["max_stop_token_ids"]
    max_messages: Annotated[int, Meta(description="messages of a chat")] = 2_048
    max_parts: Annotated[int, Meta(description="content parts of a message")] = 256
    max_tools: Annotated[int, Meta(description="tools of a request")] = 128
    max_media_parts: Annotated[int, Meta(description="pictures of a request")] = 16
    max_media_bytes: Annotated[int, Meta(description="bytes of a picture")] = 20 * MIB
    media_inflight_bytes: Annotated[int, Meta(description="bytes of pictures that are fetched at once")] = 1024 * MIB
    media_timeout_s: Annotated[float, Meta(description="seconds to fetch a picture")] = 10.0
    max_image_pixels: Annotated[int, Meta(description="pixels of a picture")] = 32 * MIB
    max_image_side: Annotated[int, Meta(description="pixels of a picture's longer side")] = 16_384
    max_image_aspect: Annotated[int, Meta(description="longer side over shorter side")] = 200
    max_video_frames: Annotated[int, Meta(description="frames of a film")] = 512
    max_audio_seconds: Annotated[float, Meta(description="seconds of a sound")] = 600.0
    max_audio_channels: Annotated[int, Meta(description="channels of a sound")] = 8
    max_request_timeout_s: Annotated[
        float, Meta(description="seconds a request may take, also where its caller says nothing")
    ] = 3600.0
    max_schema_bytes: Annotated[int, Meta(description="bytes of a JSON schema or grammar")] = 65_536
    max_schema_depth: Annotated[int, Meta(description="schemas inside one another")] = 32
    max_regex_chars: Annotated[int, Meta(description="characters of a regex")] = 4_096
    max_grammar_states: Annotated[int, Meta(description="states a regex may unfold to")] = 100_000
    grammar_timeout_s: Annotated[float, Meta(description="seconds to compile a grammar")] = 5.0
    grammar_cache_bytes: Annotated[int, Meta(description="bytes of compiled grammars that are kept")] = 256 * MIB
    max_embedding_inputs: Annotated[int, Meta(description="inputs, documents or texts of a request")] = 2_048
    max_stored_responses: Annotated[int, Meta(description="responses kept to be asked for again")] = 1_000
    response_store_bytes: Annotated[int, Meta(description="bytes of them together")] = 256 * MIB
    max_template_chars: Annotated[int, Meta(description="characters of a caller's chat template")] = 65_536
    template_timeout_s: Annotated[float, Meta(description="seconds to render a chat template")] = 2.0
    max_tokenize_chars: Annotated[int, Meta(description="characters to /tokenize")] = 4 * MIB

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            _check_limit(name, getattr(self, name))

    def grammar(self) -> GrammarLimits:
        """Those of them that are about grammars."""
        return GrammarLimits(
            max_schema_bytes=self.max_schema_bytes,
            max_schema_depth=self.max_schema_depth,
            max_regex_chars=self.max_regex_chars,
            max_grammar_states=self.max_grammar_states,
            timeout_s=self.grammar_timeout_s,
            cache_bytes=self.grammar_cache_bytes,
        )


def _check_limit(name: str, value: float | None) -> None:
    if value is None:
        return
    ceiling = CEILINGS.get(name)
    if not (math.isfinite(value) and value > 0 and (ceiling is None or value <= ceiling)):
        allowed = "more than 0" if ceiling is None else f"1..{ceiling}"
        raise ConfigError(name, value, allowed, flag=flag_of(name))
