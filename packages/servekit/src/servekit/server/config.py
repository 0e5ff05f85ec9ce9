"""The settings of the server: what it listens on, who may call, and every limit on what a caller may send."""

from __future__ import annotations

import ipaddress
import math
from typing import Annotated

import msgspec
from msgspec import Meta

from common_platform.errors import ConfigError
from servekit.sampling import parameters

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


class Limits(msgspec.Struct, frozen=True, kw_only=True):
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
    max_schema_bytes: Annotated[int, Meta(description="bytes of a JSON schema or grammar")] = 65_536
    max_schema_depth: Annotated[int, Meta(description="schemas inside one another")] = 32
    max_regex_chars: Annotated[int, Meta(description="characters of a regex")] = 4_096
    max_grammar_states: Annotated[int, Meta(description="states a regex may unfold to")] = 100_000
    max_tokenize_chars: Annotated[int, Meta(description="characters to /tokenize")] = 4 * MIB

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            _check_limit(name, getattr(self, name))


def _check_limit(name: str, value: float | None) -> None:
    if value is None:
        return
    ceiling = CEILINGS.get(name)
    if not (math.isfinite(value) and value > 0 and (ceiling is None or value <= ceiling)):
        allowed = "more than 0" if ceiling is None else f"1..{ceiling}"
        raise ConfigError(name, value, allowed, flag=flag_of(name))


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the server that is not about the engine.

    Raises:
        ConfigError: a value is out of range, or the settings together would leave the server open to a network.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ("model",)  # the first is the one in answers
    allow_insecure_bind: bool = False
    ignore_unknown_fields: bool = False
    allow_request_priority: bool = False
    shutdown_timeout_s: float = 30.0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", self.port, "0..65535", flag="--port")
        if not (math.isfinite(self.shutdown_timeout_s) and self.shutdown_timeout_s >= 0):
            raise ConfigError("shutdown_timeout_s", self.shutdown_timeout_s, "0 or more", flag="--shutdown-timeout-s")
        for name in self.served_model_names:
            if not name or len(name) > 256 or not name.isprintable():
                raise ConfigError("served_model_name", name, "1..256 characters", flag="--served-model-name")
        if not self.served_model_names:
            raise ConfigError("served_model_name", "none", "at least one", flag="--served-model-name")
        for key in self.api_keys:
            _check_key(key)
        if not (self.api_keys or self.allow_insecure_bind or is_loopback(self.host)):
            raise ConfigError(
                "host",
                self.host,
                "a loopback address where no --api-key or --api-key-file is given",
                flag="--host, --api-key-file or --insecure-no-auth (--allow-insecure-bind)",
                code="insecure_bind",
            )


def _check_key(key: str) -> None:
    """The key itself never stands in the error."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip() or len(key) > 512:
        limit = "1..512 printable ASCII characters without spaces around them"
        raise ConfigError("api_key", f"{len(key)} characters", limit, flag="--api-key-file", code="invalid_api_key")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
