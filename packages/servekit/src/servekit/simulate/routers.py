"""Which replica gets a request: small objects that see arrivals and ends, and nothing inside the replicas."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol

import numpy as np

from servekit.simulate.job import Job

LOAD_BOUND = 1.25  # times the mean load: more than that, and the next replica is asked
POINTS = 64  # of each replica on the ring
MOST_PREFIXES = 1 << 18  # remembered, the least recently used is forgotten first


class Router(Protocol):
    """Chooses by what was sent to whom; ``load`` is in tokens, prompt and output, of requests that have not ended."""

    needs_ends: bool  # whether ``ended`` matters, so that the replicas must be simulated up to each arrival

    def choose(self, job: Job) -> int:
        """The replica for ``job``, which counts as its load from now on."""

    def ended(self, replica: int, num_tokens: int) -> None:
        """A request of so many tokens is no longer there."""


class RoundRobin:
    """One after the other."""

    needs_ends = False

    def __init__(self, num_replicas: int, block_size: int) -> None:
        self._num_replicas = num_replicas
        self._next = 0

    def choose(self, job: Job) -> int:
        chosen, self._next = self._next, (self._next + 1) % self._num_replicas
        return chosen

    def ended(self, replica: int, num_tokens: int) -> None:
        """Nothing to keep."""


class LeastLoaded:
    """The fewest outstanding tokens, the lowest index among equals."""

    needs_ends = True

    def __init__(self, num_replicas: int, block_size: int) -> None:
        self.loads = [0] * num_replicas
        self._heap = [(0, replica) for replica in range(num_replicas)]  # what is no longer true is skipped

    def choose(self, job: Job) -> int:
        while self.loads[self._heap[0][1]] != self._heap[0][0]:
            heapq.heappop(self._heap)
        chosen = self._heap[0][1]
        self.add(chosen, job.num_tokens)
        return chosen

    def add(self, replica: int, num_tokens: int) -> None:
        self.loads[replica] += num_tokens
        heapq.heappush(self._heap, (self.loads[replica], replica))

    def ended(self, replica: int, num_tokens: int) -> None:
        self.add(replica, -num_tokens)


class PrefixAware:
    """Where the longest prefix went before; else by consistent hashing of the first block; never far above the mean.

    The bound on load is that of Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018:
    a replica above ``LOAD_BOUND`` times the mean passes a request on to the next one of the ring.
    """

    needs_ends = True

    def __init__(self, num_replicas: int, block_size: int) -> None:
        self.loads = [0] * num_replicas
        self._total = 0
        self._block_size = block_size
        self._known: OrderedDict[bytes, int] = OrderedDict()  # a prefix's digest -> who had it last
        points = [(_digest(b"%d/%d" % (replica, i)), replica) for replica in range(num_replicas) for i in range(POINTS)]
        self._ring = sorted(points)

    def choose(self, job: Job) -> int:
        keys = self._keys(job)
        chosen = self._holder(keys)
        if chosen is None:
            chosen = self._next_on_ring(keys[0])
        for key in keys:
            self._known[key] = chosen
            self._known.move_to_end(key)
        while len(self._known) > MOST_PREFIXES:
            self._known.popitem(last=False)
        self.loads[chosen] += job.num_tokens
        self._total += job.num_tokens
        return chosen

    def ended(self, replica: int, num_tokens: int) -> None:
        self.loads[replica] -= num_tokens
        self._total -= num_tokens

    def _keys(self, job: Job) -> list[bytes]:
        """Digests of the prompt's first block, first two blocks, and so on; of all of it where it is shorter."""
        tokens = np.array(job.prompt_token_ids(), dtype=np.int64)
        size = self._block_size
        whole = max(len(tokens) // size, 1)
        keys, parent = [], b""
        for start in range(0, whole * size, size):
            parent = _digest(parent + tokens[start : start + size].tobytes())
            keys.append(parent)
        return keys

    def _holder(self, keys: list[bytes]) -> int | None:
        """Who had the longest prefix, if it may take more."""
        holders = (self._known.get(key) for key in reversed(keys))
        return next((holder for holder in holders if holder is not None and self._has_room(holder)), None)

    def _next_on_ring(self, key: bytes) -> int:
        """The first from ``key`` on that may take more; who has no more than the mean may, so there is one."""
        first = bisect_left(self._ring, (key, 0))
        places = (self._ring[(first + i) % len(self._ring)][1] for i in range(len(self._ring)))
        return next(replica for replica in places if self._has_room(replica))

    def _has_room(self, replica: int) -> bool:
        return self.loads[replica] * len(self.loads) <= LOAD_BOUND * self._total


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


ROUTERS: dict[str, Callable[[int, int], Router]] = {  # made of the number of replicas and the block size
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "prefix_aware": PrefixAware,
}
