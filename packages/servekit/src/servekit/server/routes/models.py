"""The one model that is served, under each of its names."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from common_platform.errors import RequestError, shown
from servekit.server.errors import json_response
from servekit.server.state import ServerState, state_of

router = APIRouter()
_started = int(time.time())


def _card(name: str, state: ServerState) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _started,
        "owned_by": "servekit",
        "max_model_len": state.engine.facts.max_model_len,
        "input_modalities": ["text"],
    }


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    state = state_of(request)
    cards = [_card(name, state) for name in state.config.served_model_names]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str) -> Response:
    state = state_of(request)
    if name not in state.config.served_model_names:
        message = "no model of that name is served" if "/" in name else f"no model {shown(name)} is served"
        raise RequestError(code="model_not_found", status=404, message=message)
    return json_response(_card(name, state))
