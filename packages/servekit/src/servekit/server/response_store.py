"""Responses that may be asked for again, each by the key that made it. In memory, bounded in number and bytes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from common_platform.errors import RequestError, shown
from servekit.server.event_log import EventLog

Json = dict[str, Any]
RUNNING = ("queued", "in_progress")


@dataclass(slots=True)
class Stored:
    """``messages``: what was said until here, the answer included, for a response that goes on."""

    tenant: str
    response: Json
    messages: list[Json]
    size: int = 0
    task: asyncio.Task[None] | None = None  # that makes it, where it runs in the background
    events: EventLog | None = None  # of one made in the background


class ResponseStore:
    """The latest responses; older ones make room.

    Args:
        most: responses; max_bytes: of all of them, as JSON.
    """

    def __init__(self, most: int, max_bytes: int) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._bytes = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, stored: Stored) -> None:
        """Keep ``stored``, which may be here already in an earlier state."""
        response_id = stored.response["id"]
        before = self._stored.pop(response_id, None)
        self._bytes -= before.size if before is not None else 0
        stored.size = len(msgspec.json.encode((stored.response, stored.messages)))
        stored.size += stored.events.num_bytes if stored.events is not None else 0
        self._stored[response_id] = stored
        self._bytes += stored.size
        while len(self._stored) > self._most or self._bytes > self._max_bytes:
            oldest = next(iter(self._stored))
            if self._stored[oldest].task is not None and len(self._stored) > 1:
                self._stored.move_to_end(oldest)
                if all(one.task is not None for one in self._stored.values()):
                    return  # each of them is still being made
                continue
            self._bytes -= self._stored.pop(oldest).size

    def get(self, response_id: str, tenant: str, param: str | None = None) -> Stored:
        """Raises RequestError, 404, where there is none; another key's are not there."""
        found = self._stored.get(response_id)
        if found is None or found.tenant != tenant:
            message = f"no response {shown(response_id)} is stored"
            raise RequestError(param, code="response_not_found", status=404, message=message)
        return found

    def delete(self, response_id: str, tenant: str) -> None:
        found = self.get(response_id, tenant)
        if found.task is not None:
            found.task.cancel()
        self._bytes -= self._stored.pop(response_id).size
        found.size = 0  # nothing is kept of it, also where it is still being made

    def num_running(self) -> int:
        return sum(stored.task is not None for stored in self._stored.values())

    async def close(self) -> None:
        """End what runs in the background."""
        tasks = [stored.task for stored in self._stored.values() if stored.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
