"""HTTP/1.1 with bounds that uvicorn's protocol does not have: the size of headers, and time for them to arrive."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from servekit.server.errors import error_body
from servekit.server.limits import ServerLimits

GRACE_S = 1.0  # for the answer 408 to leave before the connection is cut


def protocol_class(limits: ServerLimits) -> type[HttpToolsProtocol]:
    """uvicorn makes one object of it a connection."""

    class BoundedProtocol(HttpToolsProtocol):
        _in_headers = True
        _header_bytes = 0
        _deadline: asyncio.TimerHandle | None = None
        _refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._set_deadline(limits.header_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._set_deadline(None)
            super().connection_lost(exc)

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

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._header_bytes = 0
            self._set_deadline(limits.body_timeout_s + GRACE_S)
            self.scope["state"]["abort_connection"] = self.transport.abort
            super().on_headers_complete()

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
            body = msgspec.json.encode(error_body(431, "headers_too_large", message))
            head = (
                "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            # Closing at once would reset the connection under the answer: what else comes is read and dropped.
            self._set_deadline(GRACE_S)

    return BoundedProtocol
