"""Answers in OpenAI's form."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from servekit.core.plan import TokenLogprob
from servekit.engine.output import RequestOutput
from servekit.engine.tokenizer import REPLACEMENT, Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have
Json = dict[str, Any]


class Envelope:
    """What all chunks of one answer have in common."""

    def __init__(self, answer_id: str, kind: str, model: str) -> None:
        self._about = {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}

    def __call__(self, choices: Sequence[Json], **more: Any) -> Json:
        return self._about | {"choices": choices, "system_fingerprint": None} | more


class Usage:
    """Tokens of all prompts and answers of one HTTP request; each prompt counts once, whatever its ``n``."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completions: dict[tuple[int, int], int] = {}
        self.num_reasoning_tokens = 0

    def add(self, prompt: int, output: RequestOutput) -> None:
        self._prompts[prompt] = (len(output.prompt_token_ids), output.num_cached_tokens)
        for choice in output.outputs:
            self._completions[prompt, choice.index] = len(choice.token_ids)

    def to_json(self) -> Json:
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        completion_tokens = sum(self._completions.values())
        made: Json = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }
        if self.num_reasoning_tokens:
            made["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning_tokens}
        return made


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer, num_top: int) -> Json:
    def entry(token_id: int, logprob: float) -> Json:
        text, raw = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}

    content = [
        entry(e.token_id, e.logprob) | {"top_logprobs": [entry(token, logprob) for token, logprob in e.top[:num_top]]}
        for e in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The four lists of the older form; offsets count characters from the start of the choice's text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> Json:
        """The prompt's own tokens: nothing comes before the first, so it has no logprob."""
        first = self._tokenizer.token_text(token_ids[0])
        made: Json = {
            "tokens": [self._label(token_ids[0])],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offset],
        }
        self._offset += len(first)
        return joined(made, self.tokens(entries))

    def tokens(self, entries: Iterable[TokenLogprob]) -> Json:
        made: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            text = self._tokenizer.token_text(entry.token_id)
            made["tokens"].append(self._label(entry.token_id))
            made["token_logprobs"].append(finite(entry.logprob))
            made["top_logprobs"].append(self._top(entry))
            made["text_offset"].append(self._offset)
            self._offset += len(text)
        return made

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in [*entry.top[: self._num_top], (entry.token_id, entry.logprob)]:
            top.setdefault(self._label(token), finite(logprob))
        return top

    def _label(self, token_id: int) -> str:
        """A token's text; for a part of a character its bytes, so that no two parts look the same."""
        text = self._tokenizer.token_text(token_id)
        if REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token_id))


def joined(first: Json, second: Json) -> Json:
    return {name: first[name] + second[name] for name in first}


def prompt_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer, num_top: int) -> list[Json | None]:
    """vLLM's form: for each prompt token a map from token id to its logprob, nothing for the first."""

    def described(token_id: int, logprob: float, rank: int) -> Json:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}

    made: list[Json | None] = [None]
    for entry in entries:
        top = {str(t): described(t, lp, rank) for rank, (t, lp) in enumerate(entry.top[:num_top], start=1)}
        made.append({str(entry.token_id): described(entry.token_id, entry.logprob, entry.rank)} | top)
    return made
