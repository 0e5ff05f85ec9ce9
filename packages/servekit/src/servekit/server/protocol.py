"""What a caller may send to the generation routes, and what it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common_platform.errors import RequestError
from servekit.core.facts import ModelFacts
from servekit.core.prompt_embeds import PromptEmbeds
from servekit.sampling.parameters import INT64_MAX, SamplingParams, StructuredOutput
from servekit.server import fields as f
from servekit.server.config import ServerConfig

Prompt = str | list[int] | PromptEmbeds


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A checked request for text; ``params`` has passed every range but the length of the prompt."""

    model: str
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None
    return_token_ids: bool = False
    pooling: str = ""  # last | mean: the prompt's vector instead of an answer
    param_names: Mapping[str, str] | None = None  # the engine's name of a field -> the caller's


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """``names``: the caller's own of each prompt, for errors."""

    prompts: list[Prompt]
    names: list[str]
    echo: bool = False
    suffix: str = ""  # what must follow the answer
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Door:
    """What requests are checked against."""

    facts: ModelFacts
    config: ServerConfig

    def model(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise f.wrong_type(path, value, "string")
        names = self.config.served_model_names
        if value not in names:
            served = ", ".join(names)
            raise RequestError(path, value, f"one of {served}"[:200], code="model_not_found", status=404)
        return value

    def priority(self, value: Any, path: str) -> int:
        check = f.integer(-(2**31), 2**31 - 1)
        if not self.config.allow_request_priority:
            check = f.refused("no priority from callers", flag="--allow-request-priority")
        return check(value, path)


def check_body(door: Door, body: dict[str, Any], checks: Mapping[str, f.Check], *required: str) -> dict[str, Any]:
    return f.check_object(
        body, "", checks, required=("model", *required), ignore_unknown=door.config.ignore_unknown_fields
    )


def common_fields(door: Door) -> dict[str, f.Check]:
    """The fields of both generation routes."""
    limits, facts = door.config.limits, door.facts
    length = facts.max_model_len
    tokens = f.integer(0, length, "--max-model-len", allowed=f"1..{length}")
    return {
        "model": door.model,
        "max_tokens": tokens,
        "min_tokens": f.integer(0, length, "--max-model-len"),
        "n": f.integer(1, limits.max_n, "--max-n"),
        "temperature": f.number(0, 2),
        "top_p": f.number(0, 1, above=True),
        "top_k": _top_k(facts.vocab_size),
        "min_p": f.number(0, 1),
        "typical_p": f.number(0, 1, above=True),
        "presence_penalty": f.number(-2, 2),
        "frequency_penalty": f.number(-2, 2),
        "repetition_penalty": f.number(0.01, 10),
        "seed": f.integer(-f.INT64, INT64_MAX, allowed="a 64-bit signed integer"),
        "logit_bias": _logit_bias(facts.vocab_size, limits.max_logit_bias),
        "allowed_token_ids": f.token_ids(facts.vocab_size, facts.vocab_size, least=1),
        "bad_words": f.listed(f.text(limits.max_stop_chars, min_chars=1), limits.max_logit_bias),
        "stop": _stop(limits.max_stop, limits.max_stop_chars),
        "stop_token_ids": f.token_ids(facts.vocab_size, limits.max_stop_token_ids, flag="--max-stop-token-ids"),
        "include_stop_str_in_output": f.boolean,
        "ignore_eos": f.boolean,
        "skip_special_tokens": f.boolean,
        "spaces_between_special_tokens": f.boolean,
        "prompt_logprobs": f.integer(0, limits.max_logprobs, "--max-logprobs"),
        "structured_outputs": f.any_object,
        "response_format": f.any_object,
        "stream": f.boolean,
        "stream_options": _stream_options,
        "user": f.text(256),
        "safety_identifier": f.text(256),
        "prompt_cache_key": f.text(256),
        "metadata": f.any_object,
        "store": f.boolean,
        "service_tier": f.one_of("auto", "default"),
        "cache_salt": f.text(256, min_chars=1),
        "priority": door.priority,
        "timeout": f.number(0, limits.max_request_timeout_s, above=True),
        "add_special_tokens": f.boolean,
        "return_token_ids": f.boolean,
        "logits_processors": f.refused("no processors from callers"),
        "prompt_embeds": f.refused("tokens only", code="prompt_embeds_disabled", flag="--enable-prompt-embeds"),
    }


SAMPLING_FIELDS = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words"),
    *("min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "prompt_logprobs"),
    *("skip_special_tokens", "spaces_between_special_tokens"),
)


def sampling_params(
    checked: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None, structured: StructuredOutput | None
) -> SamplingParams:
    given = {name: checked[name] for name in SAMPLING_FIELDS if name in checked}
    given |= {"max_tokens": max_tokens, "logprobs": logprobs, "structured_outputs": structured}
    return SamplingParams(**given)


def check_together(
    door: Door, checked: Mapping[str, Any], *, num_prompts: int, max_tokens: int | None, tokens_name: str
) -> None:
    """What fields must hold together; products are exact integers."""
    limits, n, best_of = door.config.limits, checked.get("n", 1), checked.get("best_of")
    if best_of is not None and best_of < n:
        raise RequestError("best_of", best_of, f"n={n} or more", code="conflict")
    if best_of is not None and best_of > 1 and best_of > n and checked.get("stream"):
        raise RequestError("best_of", best_of, f"n={n} with stream: the best is known at the end", code="conflict")
    sequences = num_prompts * max(n, best_of or 1)
    if sequences > limits.max_seqs_per_request:
        raise RequestError(
            "n",
            f"prompts x n = {sequences}",
            f"1..{limits.max_seqs_per_request}",
            code="out_of_range",
            flag="--max-seqs-per-request",
        )
    most = limits.max_tokens_per_request or 4 * door.facts.max_model_len
    if max_tokens is not None and n * max_tokens > most:
        got = f"n x {tokens_name} = {n * max_tokens}"
        raise RequestError(tokens_name, got, f"1..{most}", code="out_of_range", flag="--max-tokens-per-request")
    least = checked.get("min_tokens", 0)
    if max_tokens is not None and least > max_tokens:
        raise RequestError("min_tokens", least, f"0..{tokens_name}={max_tokens}", code="out_of_range")
    if checked.get("stream_options") is not None and not checked.get("stream"):
        raise RequestError("stream_options", "an object", "nothing without stream=true", code="conflict")


def stream_fields(checked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of GenerationRequest that are taken over as they are."""
    options = checked.get("stream_options") or {}
    return {
        "model": checked["model"],
        "stream": checked.get("stream", False),
        "include_usage": options.get("include_usage", False),
        "continuous_usage": options.get("continuous_usage_stats", False),
        "priority": checked.get("priority", 0),
        "cache_salt": checked.get("cache_salt", ""),
        "timeout_s": checked.get("timeout"),
        "return_token_ids": checked.get("return_token_ids", False),
    }


@f.described(f.object_schema(dict.fromkeys(("include_usage", "continuous_usage_stats"), f.boolean)))
def _stream_options(value: Any, path: str) -> dict[str, Any]:
    names = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    return f.check_object(value, path, dict.fromkeys(names, f.boolean), nullable=False)


def _top_k(vocab_size: int) -> f.Check:
    allowed = f"-1 or 1..{vocab_size}"
    return f.integer(-1, vocab_size, allowed=allowed)


def _stop(most: int, max_chars: int) -> f.Check:
    check_text = f.text(max_chars, min_chars=1, flag="--max-stop-chars")
    many = f.listed(check_text, most, flag="--max-stop")

    @f.described({"anyOf": [f.schema_of(check_text), f.schema_of(many)]})
    def check(value: Any, path: str) -> list[str]:
        return [check_text(value, path)] if isinstance(value, str) else many(value, path)

    return check


def _logit_bias(vocab_size: int, most: int) -> f.Check:
    """Token ids as JSON's keys: the one way to write an integer, so that no two keys mean the same token."""
    check_value = f.number(-100, 100)

    @f.described({"type": "object", "maxProperties": most, "patternProperties": {r"^\d+$": f.schema_of(check_value)}})
    def check(value: Any, path: str) -> dict[int, float]:
        if not isinstance(value, dict):
            raise f.wrong_type(path, value, "object")
        if len(value) > most:
            raise RequestError(path, len(value), f"0..{most} entries", code="out_of_range", flag="--max-logit-bias")
        return {_token_key(key, path, vocab_size): check_value(bias, path) for key, bias in value.items()}

    return check


def _token_key(key: str, path: str, vocab_size: int) -> int:
    digits = key.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20 or str(int(key)) != key:
        raise RequestError(path, repr(key), "token ids as keys", code="invalid_type")
    if not 0 <= int(key) < vocab_size:
        raise RequestError(path, key, f"token ids 0..{vocab_size - 1}", code="out_of_range")
    return int(key)
