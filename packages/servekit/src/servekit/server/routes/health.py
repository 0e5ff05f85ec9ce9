"""Is the server able to answer, and which is it."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from common_platform.errors import EngineDead
from servekit import __version__
from servekit.server.auth import public
from servekit.server.errors import json_response
from servekit.server.state import state_of

router = APIRouter()


@router.get("/health")
@public
async def health(request: Request) -> Response:
    """200 while the engine answers, 503 otherwise; says why only to those who have a key."""
    try:
        state_of(request).heartbeat.check()
    except EngineDead as error:
        if request.scope["state"].get("is_stranger"):
            raise EngineDead(code="not_ready", message="not ok") from error
        raise
    return json_response({"status": "ok"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """As ``/health``, and 503 while the server drains."""
    state_of(request).heartbeat.check()
    state_of(request).admission.check_room()
    return json_response({"status": "ok"})


@router.api_route("/ping", methods=["GET", "POST"])
async def ping(request: Request) -> Response:
    """As ``/health``, for those who ask here."""
    state_of(request).heartbeat.check()
    return Response()


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})
