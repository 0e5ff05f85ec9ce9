"""Answers in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common_platform.errors import PlatformError, RequestError
from servekit.core.plan import TokenLogprob
from servekit.engine.output import CompletionOutput, RequestOutput
from servekit.engine.tokenizer import Tokenizer


class AnswerFailed(PlatformError):
    """A sequence ended in the engine for a reason that is not the caller's."""

    default_code = "internal_error"


def check_answer(output: CompletionOutput) -> None:
    """Raise where an answer did not come to an end of its own."""
    if output.finish_reason == "error":
        raise AnswerFailed(message=output.error or "the engine ended this answer")
    if output.finish_reason == "timeout":
        raise RequestError("timeout", "its end", "an answer in time", code="request_timeout", status=408)


def usage(outputs: Sequence[RequestOutput], completion_tokens: int) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"content": [_chat_entry(entry, tokenizer) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_one(token, logprob, tokenizer) for token, logprob in entry.top]
    return _one(entry.token_id, entry.logprob, tokenizer) | {"top_logprobs": top}


def _one(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": max(logprob, -9999.0),
        "bytes": tokenizer.token_bytes(token),
    }


def completion_logprobs(
    entries: Sequence[TokenLogprob | None], first_token: str, tokenizer: Tokenizer, offset: int
) -> dict[str, Any]:
    """The older form: parallel lists. ``None`` stands for a prompt's first token, which nothing precedes."""
    tokens, logprobs, top, offsets = [], [], [], []
    for entry in entries:
        text = first_token if entry is None else tokenizer.token_text(entry.token_id)
        tokens.append(text)
        logprobs.append(None if entry is None else max(entry.logprob, -9999.0))
        top.append(None if entry is None else _top(entry, tokenizer))
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def _top(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float]:
    pairs = [*entry.top, (entry.token_id, entry.logprob)]
    return {tokenizer.token_text(token): max(logprob, -9999.0) for token, logprob in reversed(pairs)}
