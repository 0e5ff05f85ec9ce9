"""``POST /v1/chat/completions``."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from servekit.core.plan import TokenLogprob
from servekit.engine.output import RequestOutput
from servekit.server.body import read_json
from servekit.server.caller import Caller, caller_of
from servekit.server.chat import ChatRequest, read_chat
from servekit.server.errors import json_response
from servekit.server.formats import Envelope, chat_logprobs, prompt_logprobs
from servekit.server.gate import work
from servekit.server.generation import Hear
from servekit.server.live import LiveStream, TextEvent
from servekit.server.parsers.base import CallDelta, Delta
from servekit.server.state import ServerState, state_for_work
from servekit.server.streaming import event, while_connected
from servekit.server.turn import Answer, Piece, Turn, tool_call

router = APIRouter()


@router.post("/v1/chat/completions")
@work
async def chat_completions(request: Request) -> Response:
    state = state_for_work(request)
    body = await read_json(request, state.config.limits)
    asked = await state.sight.of(partial(read_chat, state.door, state.chat_model, body, state.chat_checks))
    answer = _ChatAnswer(state, asked, await state.turn(asked, request.receive), caller_of(request))
    if asked.stream:
        return LiveStream(answer, state.admission.stream(), state.config.limits.stream_stall_s)
    return json_response(await while_connected(request.receive, answer.whole()))


class _ChatAnswer:
    """One answer on its way: ``n`` choices to one chat."""

    def __init__(self, state: ServerState, asked: ChatRequest, turn: Turn, caller: Caller) -> None:
        self._state = state
        self._asked = asked
        self._turn = turn
        self._caller = caller
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._envelope = Envelope(f"chatcmpl-{caller.request_id[4:]}", kind, asked.model)
        self._begun: set[int] = set()  # choices whose role has been sent
        self._simple: dict[int, TextEvent] = {}  # by choice
        self.is_whole = False

    async def whole(self) -> dict[str, Any]:
        answers = await self._turn.whole(self._caller)
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(choices, usage=self._turn.usage.to_json(), **self._about_prompt())

    def _about_prompt(self) -> dict[str, Any]:
        about: dict[str, Any] = {}
        output, num_top = self._turn.output, self._asked.params.prompt_logprobs
        if output is not None and self._asked.return_token_ids:
            about["prompt_token_ids"] = output.prompt_token_ids
        if output is not None and num_top is not None:
            entries = output.prompt_logprobs or []
            about["prompt_logprobs"] = prompt_logprobs(entries, self._state.engine.tokenizer, num_top)
        return about

    async def open(self, hear: Hear) -> None:
        await self._turn.open(self._caller, hear)

    def take(self, prompt: int, output: RequestOutput) -> bytes:
        self.is_whole = output.finished
        return b"".join([self._event(piece) for piece in self._turn.take(prompt, output)])

    def _event(self, piece: Piece) -> bytes:
        simple = self._simple.get(piece.index)
        if simple is not None and piece.delta.is_content and piece.finish_reason is None:
            return simple(piece.delta.content) if piece.delta.content else b""
        if simple is None and self._is_simple:
            self._simple[piece.index] = TextEvent(partial(self._content_chunk, piece.index))
        return b"".join([event(self._envelope([c], **self._running_usage())) for c in self._chunks(piece)])

    def text_event(self, prompt: int) -> TextEvent | None:
        return self._simple.get(prompt) if self._turn.is_plain else None

    @property
    def _is_simple(self) -> bool:
        """Whether a piece of content is nothing but its text."""
        asked = self._asked
        return not (asked.params.logprobs is not None or asked.return_token_ids or asked.continuous_usage)

    def _content_chunk(self, index: int, text: str) -> dict[str, Any]:
        piece = Piece(index, Delta(content=text), [], [])
        return self._envelope([self._choice(index, {"delta": self._delta(piece)}, piece)], **self._running_usage())

    def last(self) -> bytes:
        return event(self._envelope([], usage=self._turn.usage.to_json())) if self._asked.include_usage else b""

    async def close(self) -> None:
        await self._turn.close()

    def _running_usage(self) -> dict[str, Any]:
        if self._asked.continuous_usage:
            return {"usage": self._turn.usage.to_json()}
        return {"usage": None} if self._asked.include_usage else {}

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The role first, then what comes; the reason of the end stands in the last chunk."""
        chunks = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", "content": ""}
            chunks.append({"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None})
        wanted = self._asked.return_token_ids or self._asked.params.logprobs is not None
        if piece.delta or piece.finish_reason or (wanted and piece.token_ids):
            chunks.append(self._choice(piece.index, {"delta": self._delta(piece)}, piece))
        return chunks

    def _delta(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.delta.reasoning:
            delta["reasoning_content"] = piece.delta.reasoning
        if piece.delta.content:
            delta["content"] = piece.delta.content
        if piece.delta.calls:
            delta["tool_calls"] = [self._call_delta(piece.index, call) for call in piece.delta.calls]
        return delta

    def _call_delta(self, index: int, call: CallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        begun = self._turn.answers[index].calls[call.index]
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": begun.id, "type": "function", "function": function}

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [tool_call(call) for call in answer.calls]
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        return self._choice(index, {"message": message}, answer)

    def _choice(self, index: int, said: dict[str, Any], what: Piece | Answer) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index} | said
        made |= {"logprobs": self._logprobs(what.logprobs), "finish_reason": what.finish_reason}
        if what.finish_reason is not None:
            made["stop_reason"] = what.stop_reason
        if self._asked.return_token_ids:
            made["token_ids"] = what.token_ids
        return made

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        num_top = self._asked.params.logprobs
        return None if num_top is None else chat_logprobs(entries, self._state.engine.tokenizer, num_top)
