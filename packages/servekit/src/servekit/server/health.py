"""Whether the engine answers: asked once a second, believed only as long as it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from common_platform.errors import EngineDead
from servekit.engine.async_engine import AsyncEngine

ASK_EVERY_S = 1.0
IDLE_STALL_S = 5.0  # an engine with nothing to do answers at once


class Heartbeat:
    """Runs as a task beside the server.

    Args:
        step_stall_s: how long a step may take with requests under way; the engine answers between steps.
    """

    def __init__(
        self, engine: AsyncEngine, *, step_stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._step_stall_s = step_stall_s
        self._clock = clock
        self._asked_at: float | None = None  # of a question still open

    async def run(self) -> None:
        while not self._engine.given_up.is_set():
            self._asked_at = self._clock() if self._asked_at is None else self._asked_at
            try:
                await self._engine.stats()
                self._asked_at = None
            except TimeoutError:
                continue  # still open: the first question's time counts
            except EngineDead:
                self._asked_at = None  # of another process the next time
            await asyncio.sleep(ASK_EVERY_S)

    def check(self) -> None:
        """Raise EngineDead where the engine has ended, or has been silent for too long."""
        if self._engine.dead is not None:
            raise self._engine.dead
        if not self._engine.has_process:
            raise EngineDead(message="the engine has stopped")
        limit = self._step_stall_s if self._engine.num_requests else IDLE_STALL_S
        silent = 0.0 if self._asked_at is None else self._clock() - self._asked_at
        if silent > limit:
            raise EngineDead(code="engine_stalled", message="the engine does not answer")
