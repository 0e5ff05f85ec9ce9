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
    answering = asyncio.current_task()
    gone = asyncio.create_task(_left(receive))
    has_left = False

    def leave(gone: asyncio.Task[None]) -> None:
        nonlocal has_left
        if answering is not None and not gone.cancelled():
            has_left = answering.cancel()

    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and answering is not None and not answering.uncancel():
            raise ClientGone from None
        raise
    finally:
        gone.remove_done_callback(leave)
        gone.cancel()


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
        self._since = 0.0  # by the loop's clock: the last chunk
        self._num_sending = 0
        self._is_stalled = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

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
        """The events, watched over by a timer, so that an event costs none of its own."""
        answering = asyncio.current_task()
        self._since = self._loop.time()
        self._look_later(send, answering)
        try:
            await self._send_all(scope, receive, send)
        except asyncio.CancelledError:
            if self._is_stalled and answering is not None and not answering.uncancel():
                raise SlowClient from None
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            if self._comment is not None:
                self._comment.cancel()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        try:
            async for chunk in self._events:
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
        except Exception:
            if self._has_begun:
                await self._send(send, self._form.error(internal_error(request_id)), last=True)
            raise

    def _look_later(self, send: Send, answering: asyncio.Task[None] | None) -> None:
        self._timer = self._loop.call_later(min(KEEP_ALIVE_S, self._stall_s) / 4, self._look, send, answering)

    def _look(self, send: Send, answering: asyncio.Task[None] | None) -> None:
        """Send a comment where nothing comes, and end ``answering`` where nothing is read."""
        idle_s = self._loop.time() - self._since
        if self._num_sending and idle_s > self._stall_s and answering is not None:
            self._is_stalled = True
            answering.cancel()
            return
        if not self._num_sending and idle_s > KEEP_ALIVE_S:
            self._comment = self._loop.create_task(self._send(send, KEEP_ALIVE))
        self._look_later(send, answering)

    async def _send(self, send: Send, chunk: bytes, *, last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._since = self._loop.time()
        self._num_sending += 1
        await send({"type": "http.response.body", "body": chunk, "more_body": not last})
        self._num_sending -= 1
