"""Deny by default: once a key is set, every route but GET /health wants it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from common_platform.errors import ConfigError
from servekit.server.errors import error_body, json_response

PUBLIC = {("GET", "/health"), ("HEAD", "/health")}
SHORTEST_KEY = 8


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class ApiKeys:
    """The keys that open the server, kept as digests.

    Raises:
        ConfigError: a key is too short to be one.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        for key in keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
                wanted = f"{SHORTEST_KEY} or more ASCII characters without spaces"
                raise ConfigError("api_key", f"{len(key)} characters", wanted, flag="--api-key")
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Compares with every key, in constant time."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def keys_from(api_keys: Sequence[str], file: Path | None, environment: str | None) -> list[str]:
    """Keys by flag, by a file with one a line, and by the environment."""
    keys = [*api_keys, *([environment] if environment else [])]
    if file is not None:
        lines = file.read_text().splitlines()
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return keys


class RequireKey:
    """An ASGI layer around the whole app, so that no route can be forgotten."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and (scope["method"], scope["path"]) not in PUBLIC:
            code = self._refusal([value for name, value in scope["headers"] if name == b"authorization"])
            if code:
                message = (
                    "no API key: send 'Authorization: Bearer KEY'" if code == "missing_api_key" else "wrong API key"
                )
                response = json_response(401, error_body(401, code, message), {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: list[bytes]) -> str | None:
        if not headers:
            return "missing_api_key"
        scheme, _, key = headers[0].partition(b" ")
        right = len(headers) == 1 and scheme.lower() == b"bearer" and self._keys.accept(key.strip())
        return None if right else "invalid_api_key"
