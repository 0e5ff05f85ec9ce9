"""Admission: what is too much is refused at once, never left to wait for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common_platform.errors import Overloaded, RequestError
from servekit.engine.async_engine import AsyncEngine
from servekit.server.limits import ServerLimits

CLOSED = {
    "draining": "the server is shutting down; send this to another one",
    "paused": "the server takes no new requests; send this to another one, or later",
    "sleeping": "the model is not in memory; send this to another one, or later",
}


class Admission:
    """Decides whether there is room for one more request."""

    def __init__(self, engine: AsyncEngine, limits: ServerLimits) -> None:
        self._engine = engine
        self._limits = limits
        self.num_streams = 0
        self.closed_for: str | None = None  # draining | paused | sleeping

    def check_room(self) -> None:
        """Raise Overloaded while the server takes nothing, or while the queue is full."""
        if self.closed_for is not None:
            raise Overloaded(code=self.closed_for, message=CLOSED[self.closed_for])
        most = self._engine.config.max_num_seqs + self._limits.max_queue
        if self._engine.num_requests >= most:
            message = f"{self._engine.num_requests} requests run or wait; allowed {most}; change with --max-queue"
            raise Overloaded(message=message)

    def deadline_s(self, asked: float | None) -> float:
        """Seconds that a request may take: what its caller asked for, within the checked limit, or else the limit."""
        return self._limits.max_request_timeout_s if asked is None else asked

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Hold one of the places for streamed answers."""
        if self.num_streams >= self._limits.max_streams:
            message = (
                f"{self.num_streams} streams are open; allowed {self._limits.max_streams}; change with --max-streams"
            )
            raise RequestError(code="too_many_streams", message=message, status=429)
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1
