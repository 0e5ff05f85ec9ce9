"""One turn of a chat: what the engine writes, taken apart into reasoning, answer and calls, choice by choice."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from servekit.core.plan import TokenLogprob
from servekit.engine.output import CompletionOutput, RequestOutput
from servekit.engine.tokenizer import Tokenizer
from servekit.server.caller import Caller
from servekit.server.chat import ChatRequest
from servekit.server.formats import Usage
from servekit.server.generation import Generation, Hear, Job
from servekit.server.parsers.base import Delta
from servekit.server.parsers.registry import Pipeline


@dataclass(slots=True)
class Piece:
    """What one update added to a choice. ``finish_reason`` comes with the last one: OpenAI's word."""

    index: int
    delta: Delta
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A choice as it is so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, piece: Piece, make_id: Callable[[], str]) -> None:
        self.content += piece.delta.content
        self.reasoning += piece.delta.reasoning
        for call in piece.delta.calls:
            if call.name is not None:
                self.calls.append(Call(make_id(), call.name))
            self.calls[call.index].arguments += call.arguments
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason


def call_id(parser: str) -> str:
    """Mistral's templates want nine letters and digits; everybody else takes OpenAI's form."""
    return uuid.uuid4().hex[:9] if parser == "mistral" else f"call_{uuid.uuid4().hex[:24]}"


class Turn:
    """The answers to one chat. ``usage``, ``answers`` and ``output`` are those of the pieces given out so far."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, asked: ChatRequest, prompt: str) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._asked = asked
        self._job = Job(asked, [prompt], ["prompt"], asked.add_special_tokens)
        self._readers: dict[int, _Reader] = {}
        self.usage = Usage()
        self.answers: dict[int, Answer] = {}
        self.output: RequestOutput | None = None

    async def pieces(self, caller: Caller) -> AsyncGenerator[Piece, None]:
        """All pieces, as they come; leaving early ends the request.

        Raises:
            RequestError: it cannot be served; Overloaded, EngineDead: nothing can now.
        """
        try:
            await self._generation.open(self._job, caller)
            async for prompt, output in self._generation.outputs():
                for piece in self.take(prompt, output):
                    yield piece
        finally:
            await self._generation.close()

    async def open(self, caller: Caller, hear: Hear) -> None:
        """Begin, for one who is told of every output and hands it to ``take``; ``close`` ends it."""
        await self._generation.open(self._job, caller, hear)

    @property
    def is_plain(self) -> bool:
        """Whether there is one choice, in whose text nothing is looked for: all of it but its end is content."""
        return self._asked.params.n == 1 and all(reader.is_plain for reader in self._readers.values())

    def take(self, prompt: int, output: RequestOutput) -> list[Piece]:
        self.output = output
        self.usage.add(prompt, output)
        return [self._piece(choice) for choice in output.outputs]

    async def close(self) -> None:
        await self._generation.close()

    async def whole(self, caller: Caller) -> list[Answer]:
        """The answers, once all have ended."""
        async for _ in self.pieces(caller):
            pass
        return [self.answers[index] for index in sorted(self.answers)]

    def _piece(self, choice: CompletionOutput) -> Piece:
        reader = self._readers.get(choice.index)
        if reader is None or reader.begins_again(choice):
            reader = self._readers[choice.index] = _Reader(self._asked, self._tokenizer)
            self.answers[choice.index] = Answer()
        piece = reader.read(choice)
        self.answers[choice.index].add(piece, lambda: call_id(self._asked.tools.parser))
        self.usage.num_reasoning_tokens = sum(reader.num_reasoning_tokens for reader in self._readers.values())
        return piece


class _Reader:
    """One choice's text through its parsers."""

    def __init__(self, asked: ChatRequest, tokenizer: Tokenizer) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._pipeline: Pipeline = asked.tools.pipeline(asked.reasoning_parser)
        self._has_calls = False
        self._num_tokens = 0
        self.num_reasoning_tokens = 0

    @property
    def is_plain(self) -> bool:
        return self._pipeline.is_plain

    def begins_again(self, choice: CompletionOutput) -> bool:
        """Whether the engine died, and what is read here has come before."""
        return bool(self._num_tokens and choice.num_tokens == len(choice.delta_token_ids))

    def read(self, choice: CompletionOutput) -> Piece:
        text = choice.delta_text
        is_last = choice.finish_reason is not None
        if is_last and self._asked.hides_end_token:
            text = self._without_end(text, choice)
        delta = self._pipeline.add(text)
        if is_last:
            delta.add(self._pipeline.finish())
        if not self._asked.tools.is_parallel:
            delta.calls = [call for call in delta.calls if call.index == 0]
        self._has_calls = self._has_calls or bool(delta.calls)
        self._num_tokens = choice.num_tokens
        if delta.reasoning:
            self.num_reasoning_tokens += len(choice.delta_token_ids)
        reason = choice.finish_reason
        if reason == "stop" and self._has_calls and not self._asked.tools.force:
            reason = "tool_calls"
        return Piece(choice.index, delta, choice.delta_token_ids, choice.delta_logprobs, reason, choice.stop_reason)

    def _without_end(self, text: str, choice: CompletionOutput) -> str:
        """The text without the token that ended it, which is there because special tokens are shown to parsers."""
        if choice.finish_reason != "stop" or isinstance(choice.stop_reason, str) or not choice.token_ids:
            return text
        return text.removesuffix(self._tokenizer.token_text(choice.token_ids[-1]))


def tool_call(call: Call) -> dict[str, Any]:
    """OpenAI's form of a whole call."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
