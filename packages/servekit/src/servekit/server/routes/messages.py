"""``POST /v1/messages`` and ``/v1/messages/count_tokens``, as Anthropic's clients know them."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from servekit.engine.output import RequestOutput
from servekit.server.anthropic import read_anthropic
from servekit.server.blocks import BlockEvent, Blocks, Kind, Move
from servekit.server.body import read_json
from servekit.server.caller import Caller, caller_of
from servekit.server.chat import ChatRequest
from servekit.server.errors import json_response
from servekit.server.gate import work
from servekit.server.generation import Hear
from servekit.server.live import LiveStream
from servekit.server.state import state_for_work, state_of
from servekit.server.streaming import StreamForm, while_connected
from servekit.server.turn import Answer, Turn

router = APIRouter()
Json = dict[str, Any]
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _named(event: Json) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


FORM = StreamForm(done=b"", error=lambda body: _named({"type": "error"} | body))


@router.post("/v1/messages")
@work
async def messages(request: Request) -> Response:
    state = state_for_work(request)
    body = await read_json(request, state.config.limits)
    read = partial(read_anthropic, state.door, state.chat_model, body, state.anthropic_checks, state.chat_checks)
    asked = await state.sight.of(read)
    made = _Message(asked, await state.turn(asked, request.receive), caller_of(request))
    if asked.stream:
        return LiveStream(made, state.admission.stream(), state.config.limits.stream_stall_s, FORM)
    return json_response(await while_connected(request.receive, made.whole()))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    state = state_of(request)
    body = await read_json(request, state.config.limits)
    read = partial(read_anthropic, state.door, state.chat_model, body, state.count_checks, state.chat_checks)
    asked = await state.sight.of(read)
    text = await state.render(asked.prompt, request.receive)
    ids = await asyncio.to_thread(state.engine.tokenizer.encode, text, add_special_tokens=asked.add_special_tokens)
    return json_response({"input_tokens": len(ids)})


class _Message:
    """One answer on its way."""

    def __init__(self, asked: ChatRequest, turn: Turn, caller: Caller) -> None:
        self._turn = turn
        self._caller = caller
        about = {"id": f"msg_{caller.request_id[4:]}", "type": "message", "role": "assistant", "model": asked.model}
        self._about: Json = about
        self._blocks = Blocks()
        self._has_begun = False
        self.is_whole = False

    async def whole(self) -> Json:
        answer = (await self._turn.whole(self._caller))[0]
        content: list[Json] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.content or not answer.calls:
            content.append({"type": "text", "text": answer.content})
        for call in answer.calls:
            about = {"type": "tool_use", "id": call.id, "name": call.name}
            content.append(about | {"input": _object(call.arguments)})
        return self._about | {"content": content} | _end(answer) | {"usage": self._usage()}

    def _usage(self) -> Json:
        usage = self._turn.usage.to_json()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    async def open(self, hear: Hear) -> None:
        await self._turn.open(self._caller, hear)

    def take(self, prompt: int, output: RequestOutput) -> bytes:
        self.is_whole = output.finished
        pieces = self._turn.take(prompt, output)
        events = [] if self._has_begun else [self._start()]
        self._has_begun = True
        for piece in pieces:
            events += [_block_event(event) for event in self._blocks.add(piece, self._turn.answers[0])]
        return b"".join(events)

    def text_event(self, prompt: int) -> None:
        """All outputs are taken: the blocks are counted."""

    def last(self) -> bytes:
        delta = _end(self._turn.answers[0])
        events = [_block_event(event) for event in self._blocks.finish()]
        events.append(_named({"type": "message_delta", "delta": delta, "usage": self._usage()}))
        return b"".join([*events, _named({"type": "message_stop"})])

    async def close(self) -> None:
        await self._turn.close()

    def _start(self) -> bytes:
        message = self._about | {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = self._usage() | {"output_tokens": 0}
        return _named({"type": "message_start", "message": message | {"usage": usage}})


def _block_event(event: BlockEvent) -> bytes:
    if event.move is Move.CLOSE:
        return _named({"type": "content_block_stop", "index": event.index})
    if event.move is Move.OPEN:
        return _named({"type": "content_block_start", "index": event.index, "content_block": _new_block(event)})
    kinds = {
        Kind.TEXT: ("text_delta", "text"),
        Kind.REASONING: ("thinking_delta", "thinking"),
        Kind.CALL: ("input_json_delta", "partial_json"),
    }
    kind, name = kinds[event.kind]
    return _named({"type": "content_block_delta", "index": event.index, "delta": {"type": kind, name: event.text}})


def _new_block(event: BlockEvent) -> Json:
    if event.call is not None:
        return {"type": "tool_use", "id": event.call.id, "name": event.call.name, "input": {}}
    if event.kind is Kind.REASONING:
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _end(answer: Answer) -> Json:
    is_sequence = answer.finish_reason == "stop" and isinstance(answer.stop_reason, str)
    reason = "stop_sequence" if is_sequence else REASONS.get(answer.finish_reason or "stop", "end_turn")
    if answer.calls and answer.finish_reason == "stop":  # a function that the caller forced
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": answer.stop_reason if is_sequence else None}


def _object(arguments: str) -> Json:
    """What a model wrote as arguments; where it was cut off, the text of it."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"_unparsed": arguments}
