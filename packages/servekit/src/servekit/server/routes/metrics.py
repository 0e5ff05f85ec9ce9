"""``GET /metrics``."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from common_platform.errors import EngineDead
from servekit.server.state import state_of

router = APIRouter()
PATIENCE_S = 1.0  # with an engine in a long step: then its last figures are shown


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state = state_of(request)
    state.metrics.restarts = state.engine.num_restarts
    try:
        async with asyncio.timeout(PATIENCE_S):
            state.metrics.engine = await state.engine.stats()
    except TimeoutError:
        pass
    except EngineDead:
        state.metrics.engine = None
    return Response(state.metrics.render(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
