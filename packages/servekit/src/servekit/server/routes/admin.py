"""Management: on a listener of its own, with a key of its own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from common_platform.errors import RequestError, ResourceError
from servekit.server import fields as f
from servekit.server.body import read_json
from servekit.server.errors import json_response
from servekit.server.state import ServerState, state_of

router = APIRouter(prefix="/admin")


@router.get("/status")
async def status(request: Request) -> Response:
    return json_response(_status(state_of(request)))


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forget cached prefixes; ``done`` is false where requests under way still hold some."""
    return json_response({"done": await state_of(request).engine.reset_prefix_cache()})


@router.post("/pause")
async def pause(request: Request) -> Response:
    """Take no new requests; those under way go on."""
    state_of(request).admission.closed_for = "paused"
    return json_response(_status(state_of(request)))


@router.post("/resume")
async def resume(request: Request) -> Response:
    admission = state_of(request).admission
    if admission.closed_for == "paused":
        admission.closed_for = None
    return json_response(_status(state_of(request)))


@router.post("/sleep")
async def sleep(request: Request) -> Response:
    """Give memory back: the KV cache (level 1), and the weights as well (level 2). Wants no requests under way."""
    state = state_of(request)
    body = await read_json(request, state.config.limits) if _has_body(request) else {}
    level = f.check_object(body, "", {"level": f.integer(1, 2)}).get("level", 1)
    before, state.admission.closed_for = state.admission.closed_for, "sleeping"
    try:
        await state.engine.sleep(level)
    except ResourceError as error:
        state.admission.closed_for = before
        raise RequestError(code="conflict", status=409, message=error.message) from error
    except BaseException:
        state.admission.closed_for = before
        raise
    return json_response(_status(state))


@router.post("/wake_up")
async def wake_up(request: Request) -> Response:
    state = state_of(request)
    await state.engine.wake_up()
    if state.admission.closed_for == "sleeping":
        state.admission.closed_for = None
    return json_response(_status(state))


@router.post("/drain")
async def drain(request: Request) -> Response:
    """End the server as SIGTERM does: no new requests, those under way have their time."""
    state = state_of(request)
    if state.begin_drain is not None:
        state.begin_drain()
    return json_response(_status(state))


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _status(state: ServerState) -> dict[str, Any]:
    return {
        "ready": state.engine.dead is None and state.admission.closed_for is None,
        "closed_for": state.admission.closed_for,
        "requests": state.engine.num_requests,
        "streams": state.admission.num_streams,
        "engine_restarts": state.engine.num_restarts,
    }
