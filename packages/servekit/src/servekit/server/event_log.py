"""The events of a response that is made in the background: kept as they come, read from any of them on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator


class EventLog:
    """Events in their order, number 0 first. Readers may come early, late, and more than once."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._news = asyncio.Event()
        self._is_closed = False
        self.num_bytes = 0

    def add(self, event: bytes) -> None:
        self._events.append(event)
        self.num_bytes += len(event)
        self._wake()

    def close(self) -> None:
        """No more will come."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def after(self, number: int) -> AsyncGenerator[bytes, None]:
        """The events behind that of ``number``, and those still to come, until the last."""
        at = number + 1
        while True:
            while at < len(self._events):
                yield self._events[at]
                at += 1
            if self._is_closed:
                return
            await self._news.wait()
