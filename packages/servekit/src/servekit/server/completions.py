"""``/v1/completions``: its fields and what they become."""

from __future__ import annotations

import base64
from typing import Any

from common_platform.errors import RequestError
from servekit.core.prompt_embeds import PromptEmbeds
from servekit.engine.prompt_embeds import read_prompt_embeds
from servekit.server import fields as f
from servekit.server.protocol import (
    CompletionRequest,
    Door,
    Prompt,
    check_body,
    check_together,
    common_fields,
    sampling_params,
    stream_fields,
)
from servekit.server.structured import structured_output

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_fields(door: Door, *, can_infill: bool = False) -> dict[str, f.Check]:
    """Args: can_infill: the model takes a ``suffix``."""
    limits = door.config.limits
    embeds = {"prompt_embeds": _embeds_of(door)} if door.config.enable_prompt_embeds else {}
    return (
        common_fields(door)
        | embeds
        | {
            "prompt": prompts_of(door, limits.max_prompts, "--max-prompts", "prompts"),
            "best_of": f.integer(1, limits.max_n, "--max-n"),
            "echo": f.boolean,
            "logprobs": f.integer(0, limits.max_logprobs, "--max-logprobs"),
            "suffix": f.text(2**31) if can_infill else _suffix,
        }
    )


def read_completion(door: Door, body: dict[str, Any], checks: dict[str, f.Check]) -> CompletionRequest:
    """The request in ``body``.

    Raises:
        RequestError: the first fault, in the order of the body.
    """
    required = ("prompt",) if body.get("prompt_embeds") is None else ()
    checked = check_body(door, _without_empty_prompt(body), checks, *required)
    prompts, prompt_names = _prompts_and_names(checked)
    if len(prompts) > door.config.limits.max_prompts:
        raise _too_many("prompt_embeds", len(prompts), "prompts", door.config.limits.max_prompts, "--max-prompts")
    echo, logprobs = checked.get("echo", False), checked.get("logprobs")
    max_tokens = _max_tokens(door, checked, echo)
    check_together(door, checked, num_prompts=len(prompts), max_tokens=max_tokens, tokens_name="max_tokens")
    spec, names = structured_output(checked, door.config.limits)
    if echo and checked.get("suffix"):
        raise RequestError("echo", True, "false with suffix", code="conflict")
    for name in ("echo", "suffix") if checked.get("prompt_embeds") else ():
        if checked.get(name):
            raise RequestError(name, checked[name], "none with prompt_embeds: they are of no text", code="conflict")
    if echo and logprobs is not None:
        checked.setdefault("prompt_logprobs", logprobs)
    return CompletionRequest(
        **stream_fields(checked),
        params=sampling_params(checked, max_tokens=max_tokens, logprobs=logprobs, structured=spec),
        param_names=names,
        prompts=prompts,
        names=prompt_names,
        echo=echo,
        suffix=checked.get("suffix") or "",
        add_special_tokens=checked.get("add_special_tokens", True),
    )


def _without_empty_prompt(body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's client wants a prompt, so who has embeddings only sends an empty one."""
    is_empty = body.get("prompt_embeds") is not None and body.get("prompt") in ("", [])
    return {name: value for name, value in body.items() if name != "prompt"} if is_empty else body


def _prompts_and_names(checked: dict[str, Any]) -> tuple[list[Prompt], list[str]]:
    """Embeddings come first."""
    prompts: list[Prompt] = []
    names: list[str] = []
    for field in ("prompt_embeds", "prompt"):
        found, is_batch = checked.get(field, ([], False))
        prompts += found
        names += [f"{field}[{index}]" if is_batch else field for index in range(len(found))]
    return prompts, names


def _embeds_of(door: Door) -> f.Check:
    """Base64 of a safetensors file, or a list of such."""
    text: dict[str, Any] = {"type": "string", "minLength": 1}
    most = door.config.limits.max_prompts

    @f.described({"anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": most}]})
    def check(value: Any, path: str) -> tuple[list[Prompt], bool]:
        if isinstance(value, str):
            return [_one_embeds(door, value, path)], False
        if not isinstance(value, list):
            raise f.wrong_type(path, value, "string or array")
        if not 1 <= len(value) <= most:
            raise _too_many(path, len(value), "prompts", most, "--max-prompts")
        return [_one_embeds(door, item, f"{path}[{index}]") for index, item in enumerate(value)], True

    return check


def _one_embeds(door: Door, value: Any, path: str) -> PromptEmbeds:
    if not isinstance(value, str):
        raise f.wrong_type(path, value, "string")
    try:
        content = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise RequestError(path, "data that is not base64", "base64", code="invalid_base64") from error
    facts = door.facts
    return read_prompt_embeds(content, path, hidden_size=facts.embed_size, max_tokens=facts.max_model_len)


def _max_tokens(door: Door, checked: dict[str, Any], echo: bool) -> int:
    max_tokens: int = checked.get("max_tokens", min(DEFAULT_MAX_TOKENS, door.facts.max_model_len - 1))
    if max_tokens == 0 and not echo:
        raise RequestError("max_tokens", 0, "1 or more; 0 only with echo", code="out_of_range")
    return max_tokens


@f.described({"const": ""})
def _suffix(value: Any, path: str) -> None:
    if f.text(2**31)(value, path):
        raise f.unsupported(path, "a suffix", "none: this model's tokenizer has no marks to fill in between")


def prompts_of(door: Door, most: int, flag: str, what: str) -> f.Check:
    """A text, token ids, or a list of either, of at most ``most``; the second value tells whether it was a list."""

    text: dict[str, Any] = {"type": "string", "minLength": 1}
    token = {"type": "integer", "minimum": 0, "maximum": door.facts.vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": door.facts.max_model_len}
    many = [{"type": "array", "items": one, "minItems": 1, "maxItems": most} for one in (text, tokens)]

    @f.described({"anyOf": [text, tokens, *many]})
    def check(value: Any, path: str) -> tuple[list[Prompt], bool]:
        if isinstance(value, str):
            return [_text(value, path)], False
        if not isinstance(value, list):
            raise f.wrong_type(path, value, "string or array")
        if not value:
            raise _empty(path, "an empty array")
        if isinstance(value[0], str | list):
            return _batch(door, value, path, most, flag, what), True
        return [_tokens(door, value, path)], False

    return check


def _batch(door: Door, value: list[Any], path: str, most: int, flag: str, what: str) -> list[Prompt]:
    if len(value) > most:
        raise _too_many(path, len(value), what, most, flag)
    kind = type(value[0])
    prompts: list[Prompt] = []
    for index, item in enumerate(value):
        at = f"{path}[{index}]"
        if type(item) is not kind:
            raise f.wrong_type(at, item, "one kind only: a mixed list of strings and arrays has no meaning")
        prompts.append(_text(item, at) if kind is str else _tokens(door, item, at))
    return prompts


def _too_many(path: str, count: int, what: str, most: int, flag: str) -> RequestError:
    return RequestError(path, f"{count} {what}", f"1..{most}", code="out_of_range", flag=flag)


def _text(value: str, path: str) -> str:
    if not value:
        raise _empty(path, "an empty string")
    return value


def _tokens(door: Door, value: list[Any], path: str) -> list[int]:
    if not value:
        raise _empty(path, "an empty array")
    limit = door.facts.max_model_len
    if len(value) > limit:
        allowed = f"at most {limit} tokens, prompt and answer together"
        raise RequestError(
            path, f"{len(value)} tokens", allowed, code="context_length_exceeded", flag="--max-model-len"
        )
    vocabulary = f"token ids 0..{door.facts.vocab_size - 1}"
    check = f.integer(0, door.facts.vocab_size - 1, allowed=vocabulary)
    return [check(token, f"{path}[{index}]") for index, token in enumerate(value)]


def _empty(path: str, got: str) -> RequestError:
    return RequestError(path, got, "at least one character or token", code="empty_prompt")
