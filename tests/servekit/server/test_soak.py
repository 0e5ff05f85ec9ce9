"""A long life does not make a server grow: good, bad and abandoned requests in turn (promise P5).

``SOAK_REQUESTS`` says how many; ``nox -s soak`` sends 100,000. What memory does is judged from 10,000 on.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "1000"))
EVERY = 500
JUDGED_FROM = 10_000
MIB = 1 << 20
BAD: list[tuple[str, dict[str, Any], int]] = [
    (COMPLETIONS, completion(n=0), 400),
    (COMPLETIONS, completion(max_tokens=10**9), 400),
    (COMPLETIONS, completion(prompt=[10**9]), 400),
    (COMPLETIONS, completion(temperature="hot"), 400),
    (COMPLETIONS, completion(model="other"), 404),
    (CHAT, chat(messages=[]), 400),
    (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}), 400),
]


@dataclass(frozen=True, slots=True)
class Sight:
    """What must not grow."""

    rss: int  # bytes, of the server and its children
    num_files: int
    num_threads: int
    num_series: int
    running: float
    kv_usage: float


@pytest.fixture(scope="module")
def steady(tiny_model: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(tiny_model, "--max-num-seqs", "16", "--log-level", "error")
    yield started
    started.stop()


def sight(server: ServerProcess) -> Sight:
    main = psutil.Process(server.process.pid)
    processes = [main, *main.children(recursive=True)]
    lines = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if not line.startswith("#")]
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    return Sight(
        rss=sum(process.memory_info().rss for process in processes),
        num_files=sum(process.num_fds() for process in processes),
        num_threads=sum(process.num_threads() for process in processes),
        num_series=len(lines),
        running=values["servekit:num_requests_running"] + values["servekit:num_requests_waiting"],
        kv_usage=values["servekit:kv_cache_usage_perc"],
    )


async def one(client: httpx.AsyncClient, number: int, chance: random.Random) -> str:
    """One request of the mixture, and what became of it."""
    kind = chance.random()
    if kind < 0.2:
        path, body, status = chance.choice(BAD)
        answer = await client.post(path, json=body)
        return "bad" if answer.status_code == status else f"bad: {answer.status_code} for {body}"
    path = chance.choice((COMPLETIONS, CHAT))
    body = (completion if path == COMPLETIONS else chat)(max_tokens=chance.randint(1, 12), seed=number)
    if kind < 0.3:
        async with client.stream("POST", path, json=body | {"stream": True, "max_tokens": 400}) as response:
            async for _ in response.aiter_lines():
                break
        return "left"
    if chance.random() < 0.5:
        answer = await client.post(path, json=body)
        return "good" if answer.status_code == 200 else f"good: {answer.status_code}"
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        lines = [line async for line in response.aiter_lines() if line]
    return "good" if lines[-1] == "data: [DONE]" else f"good: ended with {lines[-1]}"


async def some(server: ServerProcess, first: int, count: int, chance: random.Random) -> Counter[str]:
    places = asyncio.Semaphore(8)

    async def placed(number: int) -> str:
        async with places:
            return await one(client, number, chance)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return Counter(await asyncio.gather(*[placed(first + i) for i in range(count)]))


def settled(server: ServerProcess, baseline: Sight | None = None) -> Sight:
    """Once nothing is under way and descriptors are back."""
    files = baseline.num_files if baseline else 10**6
    found = sight(server)

    def is_settled() -> bool:
        nonlocal found
        found = sight(server)
        return found.running == 0 and found.num_files <= files

    wait_until(is_settled, 5)
    return found


@pytest.mark.timeout(7200)
def test_a_soak_does_not_grow(steady: ServerProcess) -> None:
    chance = random.Random(11)
    seen = asyncio.run(some(steady, 0, EVERY, chance))  # what is made once is made now
    baseline = settled(steady)
    memory: list[tuple[int, int]] = []
    for first in range(EVERY, REQUESTS, EVERY):
        seen += asyncio.run(some(steady, first, EVERY, chance))
        memory.append((first + EVERY, sight(steady).rss))
    last = settled(steady, baseline)
    assert set(seen) == {"good", "bad", "left"}, seen
    assert last.running == 0
    assert last.kv_usage == baseline.kv_usage
    assert last.num_files <= baseline.num_files
    assert last.num_threads <= baseline.num_threads
    assert last.num_series <= baseline.num_series + 2  # a code that had not come by the baseline
    assert steady.engine() == steady.engine_pid
    judged = [(count, rss) for count, rss in memory if count >= JUDGED_FROM]
    if len(judged) > 10:
        counts, bytes_ = np.asarray(judged, dtype=float).T
        slope = float(np.polyfit(counts, bytes_, 1)[0]) * 1000 / MIB
        growth = bytes_[-1] / bytes_[0] - 1
        print(json.dumps({"requests": REQUESTS, "rss_mib_per_1000": slope, "growth": growth}))
        assert slope <= 1
        assert growth <= 0.02
