"""The application: routes, errors in one shape, headers, and the access log."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import servekit
from common_platform.errors import PlatformError, RequestError
from servekit.server.auth import ApiKeys, RequireKey
from servekit.server.errors import body_of, error_body, internal_error, json_response, not_found
from servekit.server.routes import chat, completions
from servekit.server.state import ServerState, new_id

log = logging.getLogger("servekit.server")
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'"),
]
CODES = {404: "not_found", 405: "method_not_allowed"}


def build_app(state: ServerState, keys: ApiKeys) -> ASGIApp:
    """The whole server as one ASGI application; nothing outside of it answers a request."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = state

    def post(path: str, handle: Callable[[ServerState, Request], Awaitable[Response]]) -> None:
        async def endpoint(request: Request) -> Response:
            return await handle(state, request)

        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)

    post("/v1/completions", completions.create)
    post("/v1/chat/completions", chat.create)
    _add_reads(app, state)
    app.add_exception_handler(PlatformError, _platform_error)
    app.add_exception_handler(HTTPException, _http_error)
    return Outermost(RequireKey(app, keys))


def _add_reads(app: FastAPI, state: ServerState) -> None:
    about = {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "servekit",
        "max_model_len": state.engine.facts.max_model_len,
    }

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Public: ok, or not, and no more."""
        ready = state.engine.is_ready and not state.draining
        return json_response(200 if ready else 503, {"status": "ok" if ready else "unavailable"})

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return json_response(200, {"version": servekit.__version__})

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return json_response(200, {"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        if name != state.model_name:
            raise not_found(name, "model_not_found")
        return json_response(200, about)


async def _platform_error(request: Request, error: Any) -> Response:
    request_id = request.scope["servekit.id"]
    status, body = body_of(error, request_id)
    if status == 500:
        log.error("%s: %s: %s", request_id, type(error).__name__, error, exc_info=error)
    return json_response(status, body)


async def _http_error(request: Request, error: Any) -> Response:
    code = CODES.get(error.status_code, "invalid_request")
    message = {404: "no such route", 405: f"{request.method} is not allowed here"}.get(error.status_code, "bad request")
    return json_response(error.status_code, error_body(error.status_code, code, message), dict(error.headers or {}))


class Outermost:
    """Around everything: an id for each request, headers on each answer, one log line, and the last resort."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["servekit.id"] = new_id("req")
        started, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499
        except RequestError as error:
            await json_response(*body_of(error, request_id))(scope, receive, send_with_headers)
        except Exception as error:
            log.error("%s: unexpected %s", request_id, type(error).__name__, exc_info=error)
            if not status:
                await json_response(500, internal_error(request_id))(scope, receive, send_with_headers)
            status = status or 500
        finally:
            took = (time.perf_counter() - started) * 1000
            log.info('%s "%s %s" %d %.1f ms', request_id, scope["method"], scope["path"][:200], status, took)
