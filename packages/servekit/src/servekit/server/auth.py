"""Keys: deny by default, at one place, outside the router."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from common_platform.errors import RequestError
from servekit.server.errors import error_response, request_id_of
from servekit.server.keys import KeyRing

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])


def public(endpoint: Endpoint) -> Endpoint:
    """Mark the endpoint of a route that needs no key."""
    endpoint.is_public = True  # type: ignore[attr-defined]
    return endpoint


class Auth:
    """Lets a request through if its route is public or its key is one of ours.

    Args:
        others: keys that are right elsewhere, and have no rights here.
    """

    def __init__(self, app: ASGIApp, router: Router, keys: KeyRing, others: KeyRing | None = None) -> None:
        self._app = app
        self._router = router
        self._keys = keys
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys:
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["tenant"] = self._tenant(scope)
        except RequestError as error:
            if not self._is_public(scope):
                response = error_response(error, request_id_of(Request(scope)))
                await response(scope, receive, send)
                return
            scope["state"]["is_stranger"] = True
        await self._app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        """By the route that will answer, not by what the path looks like."""
        for route in self._router.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return getattr(getattr(route, "endpoint", None), "is_public", False)
        return False

    def _tenant(self, scope: Scope) -> str:
        """Raise RequestError unless exactly one ``Authorization: Bearer`` or ``X-Api-Key`` holds one of the keys."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        given += [b"bearer " + value for name, value in scope["headers"] if name == b"x-api-key"]  # Anthropic's clients
        if not given:
            raise _refused("missing_api_key", "no API key; send it as Authorization: Bearer KEY, or as X-Api-Key: KEY")
        scheme, _, key = given[0].partition(b" ")
        tenant = self._keys.tenant(key.strip())
        if len(given) > 1 or scheme.lower() != b"bearer" or tenant is None:
            if self._others is not None and self._others.tenant(key.strip()) is not None:
                message = "this key is not for management; use the one of --admin-key-file"
                raise RequestError(code="permission_denied", message=message, status=403)
            raise _refused("invalid_api_key", "the API key is not valid")
        return tenant


def _refused(code: str, message: str) -> RequestError:
    return RequestError(code=code, message=message, status=401)
