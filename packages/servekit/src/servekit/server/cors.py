"""Pages of other origins may call the server where the operator named them; otherwise nothing here is sent."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = "GET, POST, DELETE"
HEADERS = "Authorization, Content-Type, X-Api-Key, X-Request-Id, Anthropic-Version, OpenAI-Organization, OpenAI-Project"
EXPOSED = "X-Request-Id, Retry-After"
MAX_AGE_S = 600


class Cors:
    """Args: origins: such as ``https://example.org``; ``*`` for any. Cookies are never allowed, as there are none."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = {origin.encode("latin-1") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin = headers.get(b"origin")
        if origin is None or not ({origin, b"*"} & self._origins):
            await self._app(scope, receive, send)
            return
        allowed = origin.decode("latin-1")
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await _preflight(allowed, send)
            return

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                made = MutableHeaders(raw=message.setdefault("headers", []))
                made["Access-Control-Allow-Origin"] = allowed
                made["Access-Control-Expose-Headers"] = EXPOSED
                made["Cross-Origin-Resource-Policy"] = "cross-origin"
                made.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, send_with_origin)


async def _preflight(origin: str, send: Send) -> None:
    headers = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Allow-Headers": HEADERS,
        "Access-Control-Max-Age": str(MAX_AGE_S),
        "Vary": "Origin",
    }
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})
