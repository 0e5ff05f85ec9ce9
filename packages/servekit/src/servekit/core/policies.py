"""Who goes first: small objects that order the waiting queue and the running list.

A policy only ranks. ``rank`` orders both the queue (lowest first) and the victims of preemption (highest first), so
that the request which would have been admitted last gives way first.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, Protocol

from servekit.core.request import Request


class Policy(Protocol):
    """The order of waiting and running requests."""

    counts_service: bool  # whether ``served`` is to be called

    def rank(self, request: Request) -> Any:
        """Sorts ascending: the first runs first."""

    def push(self, request: Request) -> None: ...
    def peek(self) -> Request | None: ...
    def pop(self) -> Request: ...
    def discard(self, request: Request) -> None:
        """Take a waiting request out of the queue."""

    def served(self, request: Request, num_tokens: int) -> None:
        """``num_tokens`` of ``request`` were planned."""

    def in_order(self, running: list[Request]) -> list[Request]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...


class _Heap:
    """A queue by a fixed key. Requests that left it stay in the heap until they come to the top."""

    counts_service = False

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Request]] = []
        self._waiting: dict[str, Request] = {}

    def rank(self, request: Request) -> Any:
        return request.order

    def push(self, request: Request) -> None:
        self._waiting[request.id] = request
        heapq.heappush(self._heap, (self.rank(request), request.order, request))

    def peek(self) -> Request | None:
        while self._heap and self._waiting.get(self._heap[0][2].id) is not self._heap[0][2]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Request:
        request = self.peek()
        if request is None:
            raise IndexError("the queue is empty")
        heapq.heappop(self._heap)
        del self._waiting[request.id]
        return request

    def discard(self, request: Request) -> None:
        self._waiting.pop(request.id, None)

    def served(self, request: Request, num_tokens: int) -> None:
        """Nothing to keep."""

    def in_order(self, running: list[Request]) -> list[Request]:
        return sorted(running, key=self.rank)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Any:
        return iter(list(self._waiting.values()))


class Fcfs(_Heap):
    """First come, first served; a preempted request comes back to its old place."""

    def in_order(self, running: list[Request]) -> list[Request]:
        return sorted(running, key=attrgetter("order"))


class ByPriority(_Heap):
    """Lower ``priority`` first, then first come, first served."""

    def rank(self, request: Request) -> Any:
        return (request.priority, request.order)


class Fair:
    """The tenant that got the fewest tokens so far goes first, its own requests in order of arrival.

    A tenant that comes back from a pause starts level with the least served active one, so that it can neither
    hoard its pause nor starve: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (VTC).
    """

    counts_service = True

    def __init__(self) -> None:
        self._queues: dict[str, deque[Request]] = {}
        self._served: defaultdict[str, int] = defaultdict(int)
        self._active: defaultdict[str, int] = defaultdict(int)  # requests waiting, or running when last looked at
        self._count = 0

    def rank(self, request: Request) -> Any:
        return (self._served[request.tenant], request.tenant, request.order)

    def push(self, request: Request) -> None:
        queue = self._queues.setdefault(request.tenant, deque())
        if not queue and not self._active[request.tenant]:
            self._lift(request.tenant)
        if queue and request.order < queue[0].order:
            queue.appendleft(request)
        else:
            queue.append(request)
        self._count += 1

    def _lift(self, tenant: str) -> None:
        others = [self._served[name] for name in self._tenants() if name != tenant]
        if others:
            self._served[tenant] = max(self._served[tenant], min(others))

    def _tenants(self) -> Iterable[str]:
        return {name for name, queue in self._queues.items() if queue} | {n for n, c in self._active.items() if c}

    def peek(self) -> Request | None:
        heads = [queue[0] for queue in self._queues.values() if queue]
        return min(heads, key=self.rank, default=None)

    def pop(self) -> Request:
        request = self.peek()
        if request is None:
            raise IndexError("the queue is empty")
        self._remove(request)
        return request

    def discard(self, request: Request) -> None:
        if request in self._queues.get(request.tenant, ()):
            self._remove(request)

    def _remove(self, request: Request) -> None:
        queue = self._queues[request.tenant]
        queue.remove(request)
        if not queue:
            del self._queues[request.tenant]
        self._count -= 1

    def served(self, request: Request, num_tokens: int) -> None:
        self._served[request.tenant] += num_tokens

    def in_order(self, running: list[Request]) -> list[Request]:
        self._active.clear()
        for request in running:
            self._active[request.tenant] += 1
        self._forget_idle()
        return sorted(running, key=self.rank)

    def _forget_idle(self) -> None:
        """A tenant with nothing here keeps its count only while it is ahead of somebody who is."""
        tenants = set(self._tenants())
        if tenants and len(self._served) > 2 * len(tenants) + 1024:
            least = min(self._served[name] for name in tenants)
            self._served = defaultdict(int, {n: c for n, c in self._served.items() if n in tenants or c > least})

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Any:
        return iter([request for queue in self._queues.values() for request in queue])


POLICIES: dict[str, type[Policy]] = {"fcfs": Fcfs, "priority": ByPriority, "fair": Fair}
