"""A workload on many replicas: arrivals and steps in the order of virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from common_platform.errors import ConfigError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.engine.collector import fewer_collections
from servekit.simulate.cost import CostModel
from servekit.simulate.fast_forward import FastReplica
from servekit.simulate.job import Job
from servekit.simulate.record import Record
from servekit.simulate.replica import Replica
from servekit.simulate.routers import ROUTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What is simulated: replicas that are all alike, and who chooses among them."""

    cost: CostModel
    scheduler: SchedulerConfig
    cache: CacheConfig
    num_replicas: int = 1
    router: str = "round_robin"
    fast_forward: bool = True  # False visits every row in every step: the same answers, later

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError("num_replicas", self.num_replicas, "1 or more", flag="--num-replicas")
        if self.router not in ROUTERS:
            raise ConfigError("router", self.router, f"one of {tuple(ROUTERS)}", flag="--router")
        if self.cache.num_offload_blocks:
            raise ConfigError("num_offload_blocks", self.cache.num_offload_blocks, "0: the cost model has no transfers")


@dataclass(slots=True)
class Outcome:
    """What happened: a record a request, in the order in which they arrived, and the replicas as they were left."""

    config: SimulationConfig
    records: list[Record] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)


def simulate(jobs: Iterable[Job], config: SimulationConfig) -> Outcome:
    """Run ``jobs``, and what follows them, until every request has ended.

    Replicas see nothing of each other, so each is advanced only as far as the next event that could reach it: an
    arrival, or, where turns of sessions follow ends, the next step of any other replica.
    """
    with fewer_collections():
        return _Simulation(jobs, config).run()


class _Simulation:
    def __init__(self, jobs: Iterable[Job], config: SimulationConfig) -> None:
        kind = FastReplica if config.fast_forward else Replica
        self._replicas: list[Replica] = [
            kind(i, config.scheduler, config.cache, config.cost) for i in range(config.num_replicas)
        ]
        self._router = ROUTERS[config.router](config.num_replicas, config.cache.block_size)
        self._numbers = itertools.count()
        self._arrivals = [(job.arrival, next(self._numbers), job) for job in jobs]
        heapq.heapify(self._arrivals)
        self._has_sessions = any(job.follow_up is not None for _, _, job in self._arrivals)
        self._is_lazy = not self._has_sessions and not self._router.needs_ends
        self._busy: list[tuple[float, int]] = []  # (now, replica) of those with work
        self._ends: list[tuple[float, int, int]] = []  # (when, replica, tokens) that the router is to be told of
        self._outcome = Outcome(config, replicas=self._replicas)

    def run(self) -> Outcome:
        while self._arrivals or self._busy:
            self._advance_busy()
            if self._arrivals:
                self._arrive(*heapq.heappop(self._arrivals))
        for replica in self._replicas:
            replica.advance(math.inf)
        return self._outcome

    def _advance_busy(self) -> None:
        """Every replica up to the next arrival, those that are behind first."""
        while self._busy and self._busy[0][0] < self._next_arrival:
            now, index = heapq.heappop(self._busy)
            replica = self._replicas[index]
            replica.advance(self._horizon(now))
            self._take_ended(replica)
            if replica.has_work:
                heapq.heappush(self._busy, (replica.now, index))

    @property
    def _next_arrival(self) -> float:
        return self._arrivals[0][0] if self._arrivals else math.inf

    def _horizon(self, now: float) -> float:
        """Up to when nothing can reach a replica that is at ``now``; at least one step fits."""
        if not self._has_sessions or not self._busy:
            return self._next_arrival
        return min(self._next_arrival, max(self._busy[0][0], math.nextafter(now, math.inf)))

    def _take_ended(self, replica: Replica) -> None:
        while replica.ended:
            record = replica.ended.popleft()
            heapq.heappush(self._ends, (record.finished, replica.index, record.job.num_tokens))
            following = record.job.follow_up
            if following is not None:
                at = max(following.arrival, record.finished + record.job.think_s)
                heapq.heappush(self._arrivals, (at, next(self._numbers), following))

    def _arrive(self, at: float, number: int, job: Job) -> None:
        while self._ends and self._ends[0][0] <= at:
            self._router.ended(*heapq.heappop(self._ends)[1:])
        replica = self._replicas[self._router.choose(job)]
        if self._is_lazy:
            replica.advance(at)
        was_busy = replica.has_work
        self._outcome.records.append(replica.add(job, at))
        if self._is_lazy:
            return
        self._take_ended(replica)  # it may have been refused
        if replica.has_work and not was_busy:
            heapq.heappush(self._busy, (replica.now, replica.index))
