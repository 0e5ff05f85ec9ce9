"""HTTP/1.1 with bounds that uvicorn's protocol does not have: the size of headers, and time for them to arrive.

It also tells the request under way that its caller has gone where another stands behind it on the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from servekit.server.errors import error_body
from servekit.server.limits import ServerLimits

NO_HTTP = "the request: not HTTP/1.1 as this server reads it"
GRACE_S = 1.0  # for the answer 408 to leave before the connection is cut


class ChunkWriter:
    """Parts of an answer whose headers have been sent, given to the socket at once: between two calls of ``send``."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    def write(self, data: bytes) -> bool:
        """False, and nothing is written, while the caller reads too slowly, and where it has gone."""
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
            return False
        self._write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


def protocol_class(limits: ServerLimits) -> type[HttpToolsProtocol]:
    """uvicorn makes one object of it a connection."""

    class BoundedProtocol(HttpToolsProtocol):
        _in_headers = True
        _header_bytes = 0
        _deadline: asyncio.TimerHandle | None = None
        _refused = False
        _under_way: RequestResponseCycle | None = None  # ``cycle`` is the last that came, which may wait for it

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._set_deadline(limits.header_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._set_deadline(None)
            self._let_go()
            super().connection_lost(exc)
            self._untie()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            if self._in_headers:
                if self._header_bytes == 0:
                    self._set_deadline(limits.header_timeout_s)
                self._header_bytes += len(data)
                if self._header_bytes > limits.max_header_bytes and b"\r\n\r\n" not in data[: limits.max_header_bytes]:
                    self._refuse()
                    return
            super().data_received(data)

        def send_400_response(self, msg: str) -> None:
            """What comes is no HTTP. An answer that has begun is not to be mixed up with this one."""
            has_begun = self._under_way is not None and self._under_way.response_started
            is_done = self._under_way is None or self._under_way.response_complete
            self._let_go()
            if not self.transport.is_closing():
                if is_done or not has_begun:
                    self.transport.write(_plain_answer("400 Bad Request", error_body(400, "invalid_request", NO_HTTP)))
                self.transport.close()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            self._under_way = cycle
            super()._start_asgi_task(cycle, app)

        def _let_go(self) -> None:
            """Nobody waits for the request under way any more."""
            cycle = self._under_way
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

        def on_response_complete(self) -> None:
            self._untie()
            super().on_response_complete()

        def _untie(self) -> None:
            """What a request's state says of its connection goes, so that both end without a collection of garbage."""
            if self._under_way is not None:
                state = self._under_way.scope["state"]
                state.pop("chunk_writer", None)
                state.pop("abort_connection", None)

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._header_bytes = 0
            self._set_deadline(limits.body_timeout_s + GRACE_S)
            super().on_headers_complete()
            state = self.scope["state"]
            state["abort_connection"] = self.transport.abort
            if self.cycle is not None and self.cycle.scope is self.scope:
                state["chunk_writer"] = ChunkWriter(self.cycle)

        def on_message_complete(self) -> None:
            self._in_headers = True
            self._set_deadline(None)  # uvicorn ends connections that are kept alive for nothing
            super().on_message_complete()

        def _set_deadline(self, seconds: float | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = None if seconds is None else self.loop.call_later(seconds, self._too_slow)

        def _too_slow(self) -> None:
            if not self.transport.is_closing():
                self.transport.abort()

        def _refuse(self) -> None:
            self._refused = True
            message = f"the headers: more than {limits.max_header_bytes} bytes; change with --max-header-bytes"
            body = error_body(431, "headers_too_large", message)
            self.transport.write(_plain_answer("431 Request Header Fields Too Large", body))
            # Closing at once would reset the connection under the answer: what else comes is read and dropped.
            self._set_deadline(GRACE_S)

    return BoundedProtocol


def _plain_answer(status: str, content: dict[str, Any]) -> bytes:
    """An answer made here, because the request never reached the app."""
    body = msgspec.json.encode(content)
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body
