"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from common_platform.errors import RequestError
from servekit.engine.output import CompletionOutput, RequestOutput
from servekit.engine.validate import MAX_CHARS_PER_TOKEN
from servekit.server.body import read_json
from servekit.server.caller import Caller, caller_of
from servekit.server.chat import ChatRequest, read_chat
from servekit.server.errors import json_response
from servekit.server.formats import Envelope, Usage, chat_logprobs, prompt_logprobs
from servekit.server.generation import Job
from servekit.server.state import ServerState, state_of
from servekit.server.streaming import EventStream, event, while_connected

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    state = state_of(request)
    body = await read_json(request, state.config.limits)
    asked = read_chat(state.door, body, state.chat_checks)
    prompt = render(state, asked.messages, asked.add_generation_prompt, asked.template_variables)
    answer = _Answer(state, asked, prompt, caller_of(request))
    if asked.stream:
        return EventStream(answer.events(), state.config.limits.stream_stall_s)
    return json_response(await while_connected(request.receive, answer.whole()))


def render(state: ServerState, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: Any) -> str:
    """The prompt of a chat; one that could never fit is not rendered.

    Raises:
        RequestError: too long, or refused by the model's template.
    """
    facts = state.engine.facts
    num_chars = sum(len(message.get("content") or "") for message in messages)
    if num_chars > facts.max_model_len * MAX_CHARS_PER_TOKEN:
        allowed = f"at most {facts.max_model_len} tokens, prompt and answer together"
        got = f"{num_chars} characters"
        raise RequestError("messages", got, allowed, code="context_length_exceeded", flag="--max-model-len")
    return state.engine.tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, **dict(variables)
    )


class _Answer:
    """One answer on its way: ``n`` choices to one chat."""

    def __init__(self, state: ServerState, asked: ChatRequest, prompt: str, caller: Caller) -> None:
        self._state = state
        self._asked = asked
        self._caller = caller
        self._job = Job(asked, [prompt], ["prompt"], asked.add_special_tokens)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._envelope = Envelope(f"chatcmpl-{caller.request_id[4:]}", kind, asked.model)
        self._usage = Usage()
        self._begun: set[int] = set()  # choices whose role has been sent

    async def whole(self) -> dict[str, Any]:
        generation = self._state.generation()
        latest: dict[int, CompletionOutput] = {}
        output: RequestOutput | None = None
        try:
            await generation.open(self._job, self._caller)
            async for prompt, output in generation.outputs():
                self._usage.add(prompt, output)
                latest |= {choice.index: choice for choice in output.outputs}
        finally:
            await generation.close()
        choices = [self._whole_choice(latest[index]) for index in sorted(latest)]
        return self._envelope(choices, usage=self._usage.to_json(), **self._about_prompt(output))

    def _about_prompt(self, output: RequestOutput | None) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if output is not None and self._asked.return_token_ids:
            about["prompt_token_ids"] = output.prompt_token_ids
        num_top = self._asked.params.prompt_logprobs
        if output is not None and num_top is not None:
            entries = output.prompt_logprobs or []
            about["prompt_logprobs"] = prompt_logprobs(entries, self._state.engine.tokenizer, num_top)
        return about

    async def events(self) -> AsyncGenerator[bytes, None]:
        generation = self._state.generation()
        with self._state.admission.stream():
            try:
                await generation.open(self._job, self._caller)
                async for prompt, output in generation.outputs():
                    self._usage.add(prompt, output)
                    for choice in output.outputs:
                        for chunk in self._chunks(choice):
                            yield event(self._envelope([chunk], **self._running_usage()))
                if self._asked.include_usage:
                    yield event(self._envelope([], usage=self._usage.to_json()))
            finally:
                await generation.close()

    def _running_usage(self) -> dict[str, Any]:
        if self._asked.continuous_usage:
            return {"usage": self._usage.to_json()}
        return {"usage": None} if self._asked.include_usage else {}

    def _chunks(self, choice: CompletionOutput) -> list[dict[str, Any]]:
        """The role first, then text as it comes; the reason of the end stands in the last chunk."""
        chunks = []
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            delta = {"role": "assistant", "content": ""}
            chunks.append({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
        wanted = self._asked.return_token_ids or self._asked.params.logprobs is not None
        if choice.delta_text or choice.finish_reason or (wanted and choice.delta_token_ids):
            delta = {"content": choice.delta_text} if choice.delta_text else {}
            chunks.append(self._choice(choice, {"delta": delta}, choice.delta_token_ids, choice.delta_logprobs))
        return chunks

    def _whole_choice(self, choice: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._choice(choice, {"message": message}, choice.token_ids, choice.logprobs or [])

    def _choice(
        self, choice: CompletionOutput, said: dict[str, Any], token_ids: list[int], logprobs: list[Any]
    ) -> dict[str, Any]:
        made: dict[str, Any] = {"index": choice.index} | said
        made |= {"logprobs": None, "finish_reason": choice.finish_reason}
        num_top = self._asked.params.logprobs
        if num_top is not None:
            made["logprobs"] = chat_logprobs(logprobs, self._state.engine.tokenizer, num_top)
        if choice.finish_reason is not None:
            made["stop_reason"] = choice.stop_reason
        if self._asked.return_token_ids:
            made["token_ids"] = token_ids
        return made
