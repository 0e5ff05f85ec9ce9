"""Every answer that is not 2xx has one shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from common_platform.errors import EngineDead, Overloaded, PlatformError, RequestError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
RETRY_AFTER_S = "1"


def status_of(error: PlatformError) -> int:
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, EngineDead | Overloaded) else 500


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: PlatformError, request_id: str) -> tuple[int, dict[str, Any]]:
    """Status and body; what is our own fault says no more than where to look."""
    status = status_of(error)
    if status == 500:
        return status, internal_error(request_id)
    return status, error_body(status, error.code, error.message, error.param)


def internal_error(request_id: str) -> dict[str, Any]:
    return error_body(500, "internal_error", f"internal error, id {request_id}")


def json_response(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", RETRY_AFTER_S)
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def not_found(what: str, code: str = "not_found", param: str | None = None) -> RequestError:
    return RequestError(param, what, "what GET /v1/models lists", code=code, status=404)
