"""``GET /openapi.json``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from servekit.server.errors import json_response
from servekit.server.openapi import document
from servekit.server.state import state_of

router = APIRouter()


@router.get("/openapi.json")
async def description(request: Request) -> Response:
    """What every route takes, with its limits, for tools that read it."""
    return json_response(document(state_of(request)))
