"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from servekit.core.prompt_embeds import PromptEmbeds
from servekit.engine.output import CompletionOutput, RequestOutput
from servekit.server.body import read_json
from servekit.server.caller import Caller, caller_of
from servekit.server.completions import read_completion
from servekit.server.errors import json_response
from servekit.server.formats import CompletionLogprobs, Envelope, Usage, joined, prompt_logprobs
from servekit.server.gate import work
from servekit.server.generation import Generation, Hear, Job
from servekit.server.infill import Infill
from servekit.server.live import LiveStream, TextEvent
from servekit.server.protocol import CompletionRequest
from servekit.server.state import ServerState, state_for_work
from servekit.server.streaming import event, while_connected

router = APIRouter()


@router.post("/v1/completions")
@work
async def completions(request: Request) -> Response:
    state = state_for_work(request)
    body = await read_json(request, state.config.limits)
    if "prompt_embeds" in body:  # many numbers, each of which is looked at
        asked = await asyncio.to_thread(read_completion, state.door, body, state.completion_checks)
    else:
        asked = read_completion(state.door, body, state.completion_checks)
    if asked.suffix and state.infill is not None:
        asked = await asyncio.to_thread(_between, state.infill, asked)
    answer = _Answer(state, asked, caller_of(request))
    if asked.stream:
        return LiveStream(answer, state.admission.stream(), state.config.limits.stream_stall_s)
    return json_response(await while_connected(request.receive, answer.whole()))


def _between(infill: Infill, asked: CompletionRequest) -> CompletionRequest:
    texts = [prompt for prompt in asked.prompts if not isinstance(prompt, PromptEmbeds)]  # which take no suffix
    return replace(asked, prompts=[infill.prompt(text, asked.suffix) for text in texts])


class _Answer:
    """One answer on its way: all choices of all prompts."""

    def __init__(self, state: ServerState, asked: CompletionRequest, caller: Caller) -> None:
        self._state = state
        self._asked = asked
        self._caller = caller
        self._tokenizer = state.engine.tokenizer
        self._envelope = Envelope(f"cmpl-{caller.request_id[4:]}", "text_completion", asked.model)
        self._usage = Usage()
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice
        self._begun: set[int] = set()  # choices whose prompt has been echoed
        self._simple: dict[int, TextEvent] = {}  # by choice
        self._generation: Generation | None = None
        self._num_running = 0  # prompts

    def _job(self) -> Job:
        asked = self._asked
        return Job(asked, asked.prompts, asked.names, asked.add_special_tokens)

    async def whole(self) -> dict[str, Any]:
        generation = self._state.generation()
        latest: dict[int, tuple[RequestOutput, CompletionOutput]] = {}
        try:
            await generation.open(self._job(), self._caller)
            async for prompt, output in generation.outputs():
                self._usage.add(prompt, output)
                for choice in output.outputs:
                    latest[self._index(prompt, choice)] = (output, choice)
        finally:
            await generation.close()
        choices = [self._whole_choice(index, *latest[index]) for index in sorted(latest)]
        return self._envelope(choices, usage=self._usage.to_json())

    async def open(self, hear: Hear) -> None:
        self._generation = self._state.generation()
        self._num_running = len(self._asked.prompts)
        await self._generation.open(self._job(), self._caller, hear)

    def take(self, prompt: int, output: RequestOutput) -> bytes:
        self._num_running -= output.finished
        return b"".join([self._event(self._index(prompt, choice), prompt, output, choice) for choice in output.outputs])

    def _event(self, index: int, prompt: int, output: RequestOutput, choice: CompletionOutput) -> bytes:
        simple = self._simple.get(index)
        if simple is not None and choice.finish_reason is None:
            return simple(choice.delta_text) if choice.delta_text else b""
        self._usage.add(prompt, output)
        chunk = self._chunk(index, output, choice)
        if chunk is None:
            return b""
        if not (
            self._asked.params.logprobs is not None or self._asked.return_token_ids or self._asked.continuous_usage
        ):
            self._simple[index] = self._simple_event(chunk)
        return event(self._envelope([chunk], **self._running_usage()))

    def _simple_event(self, chunk: dict[str, Any]) -> TextEvent:
        """What follows ``chunk``, up to the end: nothing but text."""
        return TextEvent(lambda text: self._envelope([chunk | {"text": text}], **self._running_usage()))

    def text_event(self, prompt: int) -> TextEvent | None:
        return self._simple.get(prompt) if self._asked.params.n == 1 else None

    @property
    def is_whole(self) -> bool:
        return self._num_running == 0

    def last(self) -> bytes:
        return event(self._envelope([], usage=self._usage.to_json())) if self._asked.include_usage else b""

    async def close(self) -> None:
        if self._generation is not None:
            await self._generation.close()

    def _index(self, prompt: int, choice: CompletionOutput) -> int:
        return prompt * self._asked.params.n + choice.index

    def _running_usage(self) -> dict[str, Any]:
        if self._asked.continuous_usage:
            return {"usage": self._usage.to_json()}
        return {"usage": None} if self._asked.include_usage else {}

    def _whole_choice(self, index: int, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
        made = self._choice(index, choice, choice.text, choice.token_ids, choice.logprobs or [], output)
        if self._asked.params.prompt_logprobs is not None:
            num_top = self._asked.params.prompt_logprobs
            made["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self._tokenizer, num_top)
        return made

    def _chunk(self, index: int, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any] | None:
        """What the last update added, or None where a caller could not see it."""
        wanted = self._asked.return_token_ids or self._asked.params.logprobs is not None
        first_echo = self._asked.echo and index not in self._begun
        if not (choice.delta_text or choice.finish_reason or first_echo or (wanted and choice.delta_token_ids)):
            return None
        return self._choice(index, choice, choice.delta_text, choice.delta_token_ids, choice.delta_logprobs, output)

    def _choice(
        self,
        index: int,
        choice: CompletionOutput,
        text: str,
        token_ids: list[int],
        logprobs: list[Any],
        output: RequestOutput,
    ) -> dict[str, Any]:
        is_first = index not in self._begun
        self._begun.add(index)
        made: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": choice.finish_reason}
        if self._asked.params.logprobs is not None:
            made["logprobs"] = self._choice_logprobs(index, logprobs, output, is_first)
        if is_first and self._asked.echo:
            made["text"] = self._prompt_text(output) + text
        if choice.finish_reason is not None:
            made["stop_reason"] = choice.stop_reason
        if self._asked.return_token_ids:
            has_tokens = not isinstance(self._asked.prompts[index // self._asked.params.n], PromptEmbeds)
            shown = output.prompt_token_ids if is_first and has_tokens else None
            made |= {"token_ids": token_ids, "prompt_token_ids": shown}
        return made

    def _choice_logprobs(
        self, index: int, logprobs: list[Any], output: RequestOutput, is_first: bool
    ) -> dict[str, Any]:
        num_top = self._asked.params.logprobs or 0
        form = self._logprobs.setdefault(index, CompletionLogprobs(self._tokenizer, num_top))
        if is_first and self._asked.echo:
            prompt = form.prompt(output.prompt_token_ids, output.prompt_logprobs or [])
            return joined(prompt, form.tokens(logprobs))
        return form.tokens(logprobs)

    def _prompt_text(self, output: RequestOutput) -> str:
        return output.prompt if output.prompt is not None else self._tokenizer.decode(output.prompt_token_ids)
