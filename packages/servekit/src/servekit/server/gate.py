"""Where there is no room for work, it is refused before anything of it is read, routed or parsed.

The routes check again, with the same words: what is decided here is only what a refusal costs, which is least where it
is made first. Under ten times the load that fits, nine answers in ten are refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from common_platform.errors import Overloaded
from servekit.server.errors import answer_to
from servekit.server.state import ServerState

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])


def work(endpoint: Endpoint) -> Endpoint:
    """Mark the endpoint of a route that gives the engine something to do."""
    endpoint.is_work = True  # type: ignore[attr-defined]
    return endpoint


class Gate:
    """Stands behind the keys and before ``app``, whose routes are ``routes``."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], state: ServerState) -> None:
        self._app = app
        self._state = state
        self._work = {
            route.path: route
            for route in routes
            if isinstance(route, Route) and getattr(route.endpoint, "is_work", False)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._work.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is not None:
            try:
                self._state.check_room()
            except Overloaded as error:
                scope["route"] = route  # for the metrics
                await answer_to(error, scope["state"]["request_id"], scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
