"""What every answer gets: an id, security headers, a line in the access log, and a 500 that tells nothing."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servekit.server.errors import CLIENT_GONE

access_log = logging.getLogger("servekit.access")
log = logging.getLogger("servekit.server")
METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")
LABEL = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Envelope:
    """The outermost layer of the app.

    Args:
        answered: is told the method, the route and the status of each answer.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, str, int], None] | None = None) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        state = scope.setdefault("state", {})
        state["request_id"] = f"req-{uuid.uuid4().hex}"
        exchange = _Exchange(scope, send)
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:  # the handler of errors.py has answered; here it is told to the operator
            log.exception("request %s failed", state["request_id"])
            exchange.status = 500
        finally:
            exchange.log()
            if self._answered is not None:
                self._answered(*_series(scope), exchange.status)


def _series(scope: Scope) -> tuple[str, str]:
    """Method and route as labels, of which there are only so many."""
    method = scope["method"] if scope["method"] in METHODS else "other"
    return method, getattr(scope.get("route"), "path", "none")


class _Exchange:
    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._began = time.monotonic()
        self.status = CLIENT_GONE  # unless something is answered

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["X-Request-Id"] = self._scope["state"]["request_id"]
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    def log(self) -> None:
        """One JSON line; what a caller wrote is data in it, never a line of its own."""
        if not access_log.isEnabledFor(logging.INFO):
            return
        state: dict[str, Any] = self._scope["state"]
        line = {
            "event": "request",
            "request_id": state["request_id"],
            "method": self._scope["method"],
            "path": self._scope["path"][:256],
            "status": self.status,
            "duration_s": round(time.monotonic() - self._began, 6),
            "label": _label(self._scope),
        } | state.get("log", {})
        access_log.info(json.dumps({key: value for key, value in line.items() if value is not None}))


def _label(scope: Scope) -> str | None:
    """The caller's own X-Request-Id: a label in the log, never a key."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if LABEL.fullmatch(text) else None
    return None
