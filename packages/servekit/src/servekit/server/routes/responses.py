"""``/v1/responses``: create, stream, retrieve, cancel, delete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from common_platform.errors import PlatformError, RequestError
from servekit.engine.output import RequestOutput
from servekit.server import fields as f
from servekit.server.body import read_json
from servekit.server.caller import Caller, caller_of
from servekit.server.errors import body_of, internal_error, json_response
from servekit.server.event_log import EventLog
from servekit.server.gate import work
from servekit.server.generation import Hear
from servekit.server.live import LiveStream
from servekit.server.response_form import ResponseForm
from servekit.server.response_store import RUNNING, Stored
from servekit.server.responses import ResponseRequest, read_response
from servekit.server.state import ServerState, state_for_work, state_of
from servekit.server.streaming import EventStream, StreamForm, while_connected
from servekit.server.turn import Turn

router = APIRouter()
log = logging.getLogger("servekit.server")
Json = dict[str, Any]


def _named(event: Json) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _error_event(body: Json) -> bytes:
    about = {name: body["error"][name] for name in ("code", "message", "param")}
    return _named({"type": "error", "sequence_number": 0} | about | body)


FORM = StreamForm(done=b"", error=_error_event)


@router.post("/v1/responses")
@work
async def create(request: Request) -> Response:
    state, caller = state_for_work(request), caller_of(request)
    body = await read_json(request, state.config.limits)
    previous = body.get("previous_response_id")
    said = _said(state, previous, caller.tenant) if isinstance(previous, str) else []
    read = partial(read_response, state.door, state.chat_model, body, state.response_checks, state.chat_checks, said)
    asked = await state.sight.of(read)
    run = _Run(state, asked, await state.turn(asked.chat, request.receive), caller)
    if asked.background:
        stored = run.in_background()
        return _stream_of(state, stored, -1) if asked.stream else json_response(stored.response)
    if asked.stream:
        return LiveStream(run, state.admission.stream(), state.config.limits.stream_stall_s, FORM)
    return json_response(await while_connected(request.receive, run.whole()))


def _said(state: ServerState, response_id: str, tenant: str) -> list[Json]:
    stored = state.responses.get(response_id, tenant, "previous_response_id")
    if stored.response["status"] in RUNNING:
        limit = "a response that has ended"
        raise RequestError("previous_response_id", response_id, limit, code="conflict")
    return [dict(message) for message in stored.messages]


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> Response:
    """As JSON, or with ``?stream=true`` as its events, those after number ``starting_after``."""
    state, asked = state_of(request), request.query_params
    stored = state.responses.get(response_id, caller_of(request).tenant)
    start = _starting_after(asked.get("starting_after"))
    if f.one_of("true", "false")(asked.get("stream", "false"), "stream") == "true":
        return _stream_of(state, stored, start)
    if start >= 0:
        raise RequestError("starting_after", start, "nothing without stream=true", code="conflict")
    return json_response(stored.response)


def _starting_after(text: str | None) -> int:
    if text is None:
        return -1
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError("starting_after", text, "the number of an event, 0 or more", code="out_of_range")
    return int(text)


def _stream_of(state: ServerState, stored: Stored, number: int) -> Response:
    """The events after ``number``; a caller who leaves ends nothing, and may come again."""
    if stored.events is None:
        limit = "false: the events of a response are kept where it was made with background=true"
        raise RequestError("stream", True, limit, code="unsupported")
    return EventStream(_held(state, stored.events, number), state.config.limits.stream_stall_s, FORM)


async def _held(state: ServerState, log: EventLog, number: int) -> AsyncGenerator[bytes, None]:
    with state.admission.stream():
        async for event in log.after(number):
            yield event


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    """End a response that runs in the background; one that has ended stays as it is."""
    stored = state_of(request).responses.get(response_id, caller_of(request).tenant)
    if not stored.response["background"]:
        raise RequestError("response_id", response_id, "one made with background=true", code="conflict")
    if stored.task is not None:
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
    return json_response(state_of(request).responses.get(response_id, caller_of(request).tenant).response)


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    state_of(request).responses.delete(response_id, caller_of(request).tenant)
    return json_response({"id": response_id, "object": "response", "deleted": True})


class _Run:
    """One response being made."""

    def __init__(self, state: ServerState, asked: ResponseRequest, turn: Turn, caller: Caller) -> None:
        self._state = state
        self._asked = asked
        self._turn = turn
        self._caller = caller
        self._form = ResponseForm(f"resp_{caller.request_id[4:]}", asked.about, turn)
        self._has_begun = False
        self.is_whole = False

    async def whole(self) -> Json:
        async for piece in self._turn.pieces(self._caller):
            for _ in self._form.add(piece):
                pass
        self._store()
        return self._form.to_json()

    async def open(self, hear: Hear) -> None:
        await self._turn.open(self._caller, hear)

    def take(self, prompt: int, output: RequestOutput) -> bytes:
        self.is_whole = output.finished
        pieces = self._turn.take(prompt, output)
        events = [] if self._has_begun else [_named(event) for event in self._form.begin()]
        self._has_begun = True
        for piece in pieces:
            events += [_named(event) for event in self._form.add(piece)]
        return b"".join(events)

    def text_event(self, prompt: int) -> None:
        """All outputs are taken: events are numbered, and the whole grows with them."""

    def last(self) -> bytes:
        self._store()
        return _named(self._form.end())

    async def close(self) -> None:
        await self._turn.close()

    def in_background(self) -> Stored:
        """Begin; the response is stored from now on."""
        self._state.admission.check_room()
        self._form.status = "queued"
        stored = Stored(self._caller.tenant, self._form.to_json(), self._asked.said, events=EventLog())
        stored.task = asyncio.create_task(self._to_its_end(stored))
        self._state.responses.put(stored)
        return stored

    async def _to_its_end(self, stored: Stored) -> None:
        log_of = stored.events or EventLog()
        try:
            self._form.status = "in_progress"
            stored.response = self._form.to_json()
            await self._turn_over(log_of)
        except asyncio.CancelledError:
            self._form.fail("cancelled")
            raise
        except PlatformError as error:
            log.warning("request %s failed: %s", self._caller.request_id, error)
            self._form.fail("failed", _short(body_of(error, self._caller.request_id)[1]))
        except Exception:  # told to the operator; the caller finds it in the response
            log.exception("request %s failed", self._caller.request_id)
            self._form.fail("failed", _short(internal_error(self._caller.request_id)))
        finally:
            stored.task = None
            if stored.size:  # it has not been deleted
                self._store(log_of)
            log_of.add(_named(self._form.end()))
            log_of.close()

    async def _turn_over(self, events: EventLog) -> None:
        for event in self._form.begin():
            events.add(_named(event))
        async for piece in self._turn.pieces(self._caller):
            for event in self._form.add(piece):
                events.add(_named(event))

    def _store(self, events: EventLog | None = None) -> None:
        if not self._asked.store:
            return
        answer = self._turn.answers.get(0)
        message: Json = {"role": "assistant", "content": answer.content if answer else ""}
        if answer is not None and answer.calls:
            message["tool_calls"] = [_call(call.id, call.name, call.arguments) for call in answer.calls]
        if answer is not None and answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        messages = [*self._asked.said, message]
        self._state.responses.put(Stored(self._caller.tenant, self._form.to_json(), messages, events=events))


def _call(call_id: str, name: str, arguments: str) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _short(body: Json) -> Json:
    return {"code": "server_error", "message": body["error"]["message"]}
