"""Is the server able to answer, and which is it."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from servekit import __version__
from servekit.server.auth import public
from servekit.server.errors import json_response
from servekit.server.state import state_of

router = APIRouter()


@router.get("/health")
@public
async def health(request: Request) -> Response:
    """200 while the engine answers, 503 otherwise; says nothing else, for it needs no key."""
    state_of(request).heartbeat.check()
    return json_response({"status": "ok"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """As ``/health``, and 503 while the server drains."""
    state_of(request).heartbeat.check()
    state_of(request).admission.check_room()
    return json_response({"status": "ok"})


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})
