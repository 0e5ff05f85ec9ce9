"""The body of a request: refused by its headers where they are enough, bounded in bytes and time, strict JSON."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from common_platform.errors import RequestError
from servekit.server import json_body
from servekit.server.errors import ClientGone
from servekit.server.limits import ServerLimits

SMALL = 1 << 16  # bytes; larger bodies are parsed beside the event loop


async def read_json(request: Request, limits: ServerLimits) -> dict[str, Any]:
    """The JSON object that a caller sent.

    Raises:
        RequestError: 413, 415, 408, or 400 for what is not JSON as we take it.
        ClientGone: the caller left before the end of the body.
    """
    _check_headers(request, limits)
    data = await _read(request, limits)
    if len(data) <= SMALL:
        return json_body.parse(data, limits)
    return await asyncio.to_thread(json_body.parse, data, limits)


def _check_headers(request: Request, limits: ServerLimits) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise _unsupported("content-encoding", encoding, "identity", "unsupported_content_encoding")
    kind, _, rest = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise _unsupported("content-type", kind or "none", "application/json", "unsupported_media_type")
    for parameter in rest.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip(" \"'").lower() not in ("utf-8", "utf8"):
            raise _unsupported("charset", value.strip(), "utf-8", "unsupported_charset")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and (len(length) > 18 or int(length) > limits.max_body_bytes):
        raise _too_large(length[:20], limits)


def _unsupported(what: str, got: str, allowed: str, code: str) -> RequestError:
    return RequestError(None, code=code, status=415, message=RequestError(what, got, allowed).message)


def _too_large(got: str, limits: ServerLimits) -> RequestError:
    message = f"the body: got {got} bytes; allowed {limits.max_body_bytes}; change with --max-body-bytes"
    return RequestError(code="body_too_large", status=413, message=message)


async def _read(request: Request, limits: ServerLimits) -> bytes:
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await _collect(request, limits)
    except TimeoutError as error:
        message = f"the body: not here after {limits.body_timeout_s:g} s; change with --body-timeout-s"
        raise RequestError(code="request_timeout", status=408, message=message) from error


async def _collect(request: Request, limits: ServerLimits) -> bytes:
    data = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        data += message.get("body", b"")
        if len(data) > limits.max_body_bytes:
            raise _too_large(f"more than {limits.max_body_bytes}", limits)
        if not message.get("more_body", False):
            return bytes(data)
