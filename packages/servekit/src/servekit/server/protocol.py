"""The requests of the OpenAI API as typed structs, and what they mean as sampling parameters."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from common_platform.errors import RequestError
from servekit.sampling.parameters import MAX_LOGPROBS, SamplingParams
from servekit.server.json_body import json_name
from servekit.server.limits import ServerLimits

MAX_USER_CHARS = 256
DEFAULT_COMPLETION_TOKENS = 16
TOKEN_KEY = re.compile(r"-?(0|[1-9]\d*)")


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonFields(msgspec.Struct, kw_only=True):
    """What completions and chats have in common; None is the same as absent."""

    model: str
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    # beyond OpenAI, named as vLLM names them
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None


class CompletionRequest(CommonFields, kw_only=True):
    prompt: Any
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    prompt_embeds: Any = None


class ChatRequest(CommonFields, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None


Body = TypeVar("Body", bound=CommonFields)
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)


def convert(body: dict[str, Any], kind: type[Body], *, ignore_unknown: bool = False) -> Body:
    """The body as ``kind``.

    Raises:
        RequestError: with the codes unknown_field, missing_field, invalid_type.
    """
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in body:
        if name not in known and not ignore_unknown:
            raise RequestError(
                name,
                "an unknown field",
                "the fields of this route",
                code="unknown_field",
                flag="--ignore-unknown-fields",
            )
    for name, field in known.items():
        if field.required and name not in body:
            raise RequestError(name, "nothing", "a value: it is required", code="missing_field")
        if field.required and body[name] is None:
            raise RequestError(name, "null", "a value: it is required", code="invalid_type")
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise type_error(error, body) from error


def type_error(error: msgspec.ValidationError, body: dict[str, Any]) -> RequestError:
    text, _, path = str(error).partition(" - at `$")
    param = path.strip("`.") or None
    param = re.sub(r"\[\.\.\.\]", "", param) if param else None
    value: Any = body.get(param) if param else None
    wanted = re.sub(r"^Expected (.*?)(, got .*)?$", r"\1", text).replace("`", "").replace(" | null", "")
    return RequestError(param, json_name(value) if param in body else "another type", wanted, code="invalid_type")


def sampling_params(
    request: CommonFields,
    limits: ServerLimits,
    max_model_len: int,
    *,
    max_tokens: int | None,
    num_prompts: int = 1,
    **more: Any,
) -> SamplingParams:
    """The request's fields as checked sampling parameters; ``more`` holds what differs between the routes.

    Raises:
        RequestError: the first field that is out of its range.
    """
    values = {name: getattr(request, name) for name in SAMPLING_FIELDS if getattr(request, name) is not None}
    values |= {name: value for name, value in more.items() if value is not None}
    stop = request.stop
    values["stop"] = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if request.logit_bias is not None:
        values["logit_bias"] = _logit_bias(request.logit_bias)
    _refuse_unsupported(request)
    params = SamplingParams(n=1 if request.n is None else request.n, max_tokens=max_tokens, **values)
    _check_products(params, limits, max_model_len, num_prompts)
    return params


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not TOKEN_KEY.fullmatch(key):
            raise RequestError("logit_bias", key, "token ids as keys, in plain digits", code="invalid_type")
    return {int(key): bias for key, bias in given.items()}


def _refuse_unsupported(request: CommonFields) -> None:
    if request.user is not None and len(request.user) > MAX_USER_CHARS:
        raise RequestError("user", len(request.user), f"at most {MAX_USER_CHARS} characters", code="out_of_range")
    if request.priority:
        raise RequestError("priority", request.priority, "0 on this server", code="unsupported")
    form = request.response_format
    if form is not None and form.get("type") != "text":
        raise RequestError("response_format.type", form.get("type"), "text in this version", code="unsupported")
    if request.structured_outputs is not None:
        raise RequestError("structured_outputs", "a grammar", "none in this version", code="unsupported")


def _check_products(params: SamplingParams, limits: ServerLimits, max_model_len: int, num_prompts: int) -> None:
    sequences = num_prompts * (params.best_of or params.n)
    if sequences > limits.max_seqs_per_request:
        limit, flag = f"prompts x n up to {limits.max_seqs_per_request}", "--max-seqs-per-request"
        raise RequestError("n", sequences, limit, code="out_of_range", flag=flag)
    most = limits.max_tokens_per_request or 4 * max_model_len
    tokens = (params.best_of or params.n) * (params.max_tokens or 0)
    if params.max_tokens is not None and params.max_tokens <= max_model_len and tokens > most:
        limit, flag = f"n x max_tokens up to {most}", "--max-tokens-per-request"
        raise RequestError("max_tokens", tokens, limit, code="out_of_range", flag=flag)


def check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise RequestError(name, value, f"0..{MAX_LOGPROBS}", code="out_of_range", flag="--max-logprobs")


def prompts_of(request: CompletionRequest, limits: ServerLimits) -> list[tuple[str, str | list[int]]]:
    """The prompts, each with its name: a text, token ids, or a list of either.

    Raises:
        RequestError: an empty, mixed or too long list.
    """
    given = request.prompt
    if isinstance(given, str):
        return [("prompt", given)]
    if not isinstance(given, list):
        raise RequestError("prompt", json_name(given), "a string, token ids, or a list of these", code="invalid_type")
    if not given:
        raise RequestError("prompt", "an empty list", "at least one prompt", code="empty_prompt")
    kind = type(given[0])
    if kind is int:
        return [("prompt", given)]
    if kind not in (str, list):
        raise RequestError("prompt[0]", json_name(given[0]), "a string or an integer", code="invalid_type")
    if len(given) > limits.max_prompts:
        limit = f"at most {limits.max_prompts} prompts"
        raise RequestError("prompt", len(given), limit, code="out_of_range", flag="--max-prompts")
    for index, prompt in enumerate(given):
        if type(prompt) is not kind:
            raise RequestError(f"prompt[{index}]", json_name(prompt), "one kind in all the list", code="invalid_type")
    return [(f"prompt[{index}]", prompt) for index, prompt in enumerate(given)]
