"""Requests at a rate, or so many at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from common_platform.errors import ConfigError
from servekit.engine.collector import short_collections

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When requests are sent, and how many may be under way."""

    request_rate: float = float("inf")  # a second; inf: all at once
    burstiness: float = 1.0  # shape of the gamma distribution of gaps; 1: a Poisson process
    max_concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError("request_rate", self.request_rate, "more than 0, or inf", flag="--request-rate")
        if not 0 < self.burstiness < float("inf"):
            raise ConfigError("burstiness", self.burstiness, "more than 0", flag="--burstiness")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError("max_concurrency", self.max_concurrency, "1 or more", flag="--max-concurrency")

    def times(self, count: int) -> list[float]:
        """Seconds from the start at which each request is sent."""
        if self.request_rate == float("inf"):
            return [0.0] * count
        chance, at, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(at)
            at += chance.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))
        return times


async def send_all(asks: Sequence[A], send: Callable[[A], Awaitable[R]], pace: Pace) -> list[R]:
    """``send`` each of ``asks`` at its time; a request that has to wait for others to end is sent late."""
    places = contextlib.nullcontext() if pace.max_concurrency is None else asyncio.Semaphore(pace.max_concurrency)
    clock = asyncio.get_running_loop().time
    began = clock()

    async def one(ask: A) -> R:
        async with places:
            return await send(ask)

    under_way: list[asyncio.Task[R]] = []
    try:
        with short_collections():  # a pause here would look like one of the server's
            for ask, at in zip(asks, pace.times(len(asks)), strict=True):
                if (wait_s := began + at - clock()) > 0:
                    await asyncio.sleep(wait_s)
                under_way.append(asyncio.create_task(one(ask)))
            return list(await asyncio.gather(*under_way))
    finally:
        for task in under_way:
            task.cancel()
