"""The page at ``/``: a chat, and the server's load. Its three files hold nothing of the server's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Response

from servekit.server.auth import public

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
}


def make_router(*, is_public: bool) -> APIRouter:
    """Args: is_public: the files need no key; what the page asks for still does."""
    router = APIRouter()
    for path, (name, kind) in FILES.items():
        endpoint = _endpoint(name, kind)  # one each, for the mark of a public one is on it
        router.add_api_route(path, public(endpoint) if is_public else endpoint, methods=["GET"])
    return router


def _endpoint(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = (resources.files("servekit.server") / "page" / name).read_bytes()

    async def file() -> Response:
        return Response(content, headers={"Content-Type": kind, "Content-Security-Policy": POLICY})

    return file
