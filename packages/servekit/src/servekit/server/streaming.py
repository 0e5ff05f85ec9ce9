"""Server-sent events, and answers whose caller may leave at any moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from common_platform.errors import PlatformError
from servekit.server.errors import ClientGone, body_of, error_response, internal_error, status_of

log = logging.getLogger("servekit.server")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


def event(content: Any) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"


async def _left(receive: Receive) -> None:
    """Return when the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the caller leaves.

    Raises:
        ClientGone: the caller left first.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How a stream says that it is complete, and that it broke; ``error`` makes an event of an error's body."""

    done: bytes = DONE
    error: Callable[[dict[str, Any]], bytes] = event


OPENAI = StreamForm()


class SlowClient(Exception):
    """The caller does not read what it is sent."""


class EventStream(Response):
    """Sends events as they are made, and a comment while none comes, which keeps proxies from hanging up.

    Nothing is sent before the first event or comment is there, so that what is refused until then has a status of its
    own. After it, an error is one last event, and no ``[DONE]`` follows; ``form`` says how both are written.

    Args:
        events: its ``finally`` frees what the answer holds.
        stall_s: how long the caller may leave what was sent unread.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], stall_s: float, form: StreamForm = OPENAI) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._stall_s = stall_s
        self._form = form
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = scope["state"].setdefault("log", {})
        try:
            await while_connected(receive, self._run(scope, receive, send))
        except ClientGone:
            told["finish"] = "client_gone"
        except SlowClient:
            told["finish"] = "slow_client"
            scope["state"]["abort_connection"]()
        finally:
            await self._events.aclose()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        try:
            async for chunk in _paced(self._events):
                await self._send(send, chunk)
            await self._send(send, self._form.done, last=True)
        except PlatformError as error:
            if not self._has_begun and status_of(error) == 500:
                raise
            if not self._has_begun:
                await error_response(error, request_id)(scope, receive, send)
                return
            log.warning("request %s failed: %s", request_id, error)
            await self._send(send, self._form.error(body_of(error, request_id)[1]), last=True)
        except SlowClient:
            raise
        except Exception:
            if self._has_begun:
                await self._send(send, self._form.error(internal_error(request_id)), last=True)
            raise

    async def _send(self, send: Send, chunk: bytes, *, last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": not last})
        except TimeoutError as error:
            raise SlowClient from error


async def _paced(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, with a comment wherever nothing comes for a while."""
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(_following(events))
            await asyncio.wait({following}, timeout=KEEP_ALIVE_S)
            if following.done():
                chunk, following = following.result(), None
                if not chunk:
                    return
                yield chunk
            else:
                yield KEEP_ALIVE
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def _following(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events, b"")
