"""Errors as HTTP answers: one body for every status that is not 2xx."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from common_platform.errors import EngineDead, Overloaded, PlatformError, RequestError

if TYPE_CHECKING:  # the command line needs the errors, and not what takes a quarter of a second to load
    from fastapi import FastAPI

RETRY_AFTER_S = 1
OVERLOADED_RETRY_AFTER_S = 5
CLIENT_GONE = 499  # in the log only: there is nobody to send it to
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ROUTING = {404: ("not_found", "no such route"), 405: ("method_not_allowed", "the route does not know this method")}

TOLD_CODES = {"chat_template_limit": "chat_template_limit"}  # of faults that are ours
ANTHROPIC = "/v1/messages"
TOLD = {"not_ready": "not ok", "engine_stalled": "the engine does not answer"}


class RateLimited(RequestError):
    """A caller is over its own share; ``retry_after_s`` says when it may come again."""

    def __init__(self, *, code: str, message: str, retry_after_s: float) -> None:
        super().__init__(code=code, message=message, status=429)
        self.retry_after_s = retry_after_s


class ClientGone(Exception):
    """The caller left; there is nobody to answer."""


def status_of(error: PlatformError) -> int:
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, EngineDead | Overloaded) else 500


def error_type(status: int) -> str:
    return TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def body_of(error: PlatformError, request_id: str) -> tuple[int, dict[str, Any]]:
    """The status and body for ``error``; of our own faults only the request's id is told."""
    status = status_of(error)
    if status == 500:
        return status, internal_error(request_id, TOLD_CODES.get(error.code, "internal_error"))
    message = error.message
    if isinstance(error, EngineDead):
        message = TOLD.get(error.code, "the engine has stopped")
    return status, error_body(status, error.code, message, error.param)


def internal_error(request_id: str, code: str = "internal_error") -> dict[str, Any]:
    return error_body(500, code, f"internal error, id {request_id}")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = msgspec.json.encode(content)
    return Response(body, status, headers=dict(headers or {}), media_type="application/json")


def error_response(error: PlatformError, request_id: str) -> Response:
    status, body = body_of(error, request_id)
    return json_response(body, status, headers_for(error))


def answer_to(error: PlatformError, request_id: str, path: str) -> Response:
    """``error`` in the form that the clients of the route at ``path`` read."""
    response = error_response(error, request_id)
    if path.startswith(ANTHROPIC):  # its clients look for the word at the top
        status, body = body_of(error, request_id)
        response = json_response({"type": "error"} | body, status, headers_for(error))
    return response


def headers_for(error: PlatformError) -> dict[str, str]:
    """What goes with a status: when to come back, how to log in, that the rest of a body is not read."""
    status = status_of(error)
    if status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, RateLimited) else RETRY_AFTER_S
        if isinstance(error, Overloaded) and error.code == Overloaded.default_code:
            wait_s = random.uniform(RETRY_AFTER_S, OVERLOADED_RETRY_AFTER_S)  # so that not all come back at once
        return {"Retry-After": str(max(1, math.ceil(wait_s)))}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Connection": "close"} if status in (408, 413) else {}


def request_id_of(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


def install(app: FastAPI) -> None:
    """Answer every error that a route raises, and the router's own, in our form."""

    async def on_platform_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, PlatformError):
            raise error
        if status_of(error) == 500:
            raise error
        return answer_to(error, request_id_of(request), request.url.path)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        code, message = ROUTING.get(error.status_code, ("invalid_request", "the request cannot be served"))
        body = error_body(error.status_code, code, message)
        return json_response(body, error.status_code, error.headers)

    async def on_bug(request: Request, error: Exception) -> Response:
        if isinstance(error, PlatformError):
            return json_response(body_of(error, request_id_of(request))[1], 500)
        return json_response(internal_error(request_id_of(request)), 500)

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(PlatformError, on_platform_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_bug)
