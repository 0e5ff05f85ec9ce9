"""Many at once, and much nonsense: minutes each, so run by ``nox -s slow``; a short storm runs always."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.servekit.server.processes import PATIENCE_S, ServerProcess, wait_until
from tests.servekit.server.rows import COMPLETIONS, completion

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def sturdy(tiny_model: Path) -> Iterator[ServerProcess]:
    flags = ("--max-num-seqs", "8", "--max-queue", "16", "--max-engine-restarts", "1000", "--log-level", "error")
    started = ServerProcess(tiny_model, *flags)
    yield started
    started.stop()


async def post(server: ServerProcess, body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
    """One request over a connection of its own: clients that keep many cost more than the server that is measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps(body).encode()
    writer.write(HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close") % len(data) + data)
    head, _, content = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, json.loads(content)


async def overload(server: ServerProcess, callers: int, seconds: float) -> tuple[Counter[int], list[float], int]:
    """Statuses, seconds of each refusal, and tokens of what was accepted."""
    seen: Counter[int] = Counter()
    refusals: list[float] = []
    tokens = 0
    end = time.monotonic() + seconds

    async def caller() -> None:
        nonlocal tokens
        while time.monotonic() < end:
            begun = time.monotonic()
            status, headers, body = await post(server, completion(max_tokens=64, ignore_eos=True))
            seen[status] += 1
            if status == 200:
                tokens += body["usage"]["completion_tokens"]
            else:
                refusals.append(time.monotonic() - begun)
                assert body["error"]["code"] == "server_overloaded"
                await asyncio.sleep(float(headers["retry-after"]))

    await asyncio.gather(*[caller() for _ in range(callers)])
    return seen, sorted(refusals), tokens


def test_more_than_fits_is_refused_and_what_is_accepted_ends(sturdy: ServerProcess) -> None:
    """Sixty for 24 places: refused while nothing moves, so none of them waited for anything."""
    refused: list[int] = []

    async def ask() -> int:
        status, headers, body = await post(sturdy, completion(max_tokens=64, ignore_eos=True))
        if status != 200:
            assert (status, body["error"]["code"]) == (503, "server_overloaded")
            assert int(headers["retry-after"]) >= 1
            refused.append(status)
        return status

    async def sixty() -> Counter[int]:
        with sturdy.frozen():
            asked = [asyncio.create_task(ask()) for _ in range(60)]
            async with asyncio.timeout(PATIENCE_S):
                while len(refused) < 36:
                    await asyncio.sleep(0.02)
        return Counter(await asyncio.gather(*asked))

    assert asyncio.run(sixty()) == {200: 24, 503: 36}


@pytest.mark.slow
def test_overload_for_a_minute(sturdy: ServerProcess) -> None:
    """24 places, 240 callers; goodput is beside that of 24 callers, who are never refused."""
    calm, _, alone = asyncio.run(overload(sturdy, 24, 20))
    seen, refusals, tokens = asyncio.run(overload(sturdy, 240, 60))
    assert set(calm) == {200}
    assert set(seen) == {200, 503}
    figures = {"goodput": tokens / 60 / (alone / 20), "refusal_p99_ms": refusals[int(len(refusals) * 0.99)] * 1e3}
    print(json.dumps(figures | {"statuses": seen}))
    assert figures["goodput"] >= 0.9


async def looks_at_health(server: ServerProcess, count: int, every_s: float) -> tuple[Counter[int], list[float]]:
    """Statuses and seconds of so many looks at ``/health`` while callers keep every place taken."""
    is_over = False
    seen: Counter[int] = Counter()
    taken = []

    async def caller() -> None:
        while not is_over:
            assert (await post(server, completion(max_tokens=64, ignore_eos=True)))[0] == 200

    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        callers = [asyncio.create_task(caller()) for _ in range(24)]
        for _ in range(count):
            begun = time.monotonic()
            seen[(await client.get("/health")).status_code] += 1
            taken.append(time.monotonic() - begun)
            await asyncio.sleep(every_s)
        is_over = True
        await asyncio.gather(*callers)
    return seen, sorted(taken)


def test_a_busy_engine_is_not_a_dead_one(sturdy: ServerProcess) -> None:
    """srv-186, without its time."""
    seen, _ = asyncio.run(looks_at_health(sturdy, 30, 0.05))
    assert seen == {200: 30}


@pytest.mark.slow
def test_health_is_told_at_once_under_full_load(sturdy: ServerProcess) -> None:
    """srv-186: ten minutes, or ``HEALTH_LOOKS`` seconds, one look each."""
    count = int(os.environ.get("HEALTH_LOOKS", "600"))
    seen, taken = asyncio.run(looks_at_health(sturdy, count, 1.0))
    p99 = taken[int(len(taken) * 0.99)]
    print(json.dumps({"statuses": seen, "p99_s": p99, "worst_s": taken[-1]}))
    assert seen == {200: count}
    assert p99 <= 0.1


def held(server: ServerProcess) -> tuple[int, int, set[str]]:
    """Descriptors, children and what lies in shared memory: nothing of a dead engine stays."""
    process = psutil.Process(server.process.pid)
    shared = Path("/dev/shm")
    ours = {path.name for path in shared.iterdir() if "servekit" in path.name} if shared.exists() else set()
    return process.num_fds(), len(process.children()), ours


@pytest.mark.slow
def test_fifty_kills(sturdy: ServerProcess) -> None:
    chance = random.Random(7)
    taken = []
    before = held(sturdy)
    for _ in range(50):
        time.sleep(chance.random() * 0.5)
        sturdy.signal_engine(signal.SIGKILL)
        killed = time.monotonic()
        assert wait_until(lambda: httpx.get(f"{sturdy.url}/health").status_code == 503, 1)
        assert wait_until(lambda: httpx.get(f"{sturdy.url}/health").status_code == 200, 10)
        taken.append(time.monotonic() - killed)
    assert wait_until(lambda: held(sturdy) == before), (before, held(sturdy))
    print(json.dumps({"ready_again_s": {"median": sorted(taken)[25], "worst": max(taken)}}))
    assert len(sturdy.running("servekit.engine.process")) == 1


@pytest.mark.slow
def test_five_hundred_streams_at_once(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--max-num-seqs", "512", "--max-num-batched-tokens", "8192")
    try:
        print(json.dumps(asyncio.run(five_hundred(server))))
    finally:
        server.stop()


async def five_hundred(server: ServerProcess) -> dict[str, float]:
    """The longest pauses between two events of a stream, all of which must be whole."""
    limits = httpx.Limits(max_connections=500)

    async def one(client: httpx.AsyncClient, number: int) -> float:
        body = completion(prompt=f"stream {number}", max_tokens=64, ignore_eos=True, stream=True)
        longest, last, lines = 0.0, 0.0, []
        async with client.stream("POST", COMPLETIONS, json=body) as response:
            async for line in response.aiter_lines():
                if line:
                    now = time.monotonic()
                    longest, last = max(longest, now - (last or now)), now
                    lines.append(line)
        assert lines[-1] == "data: [DONE]"
        return longest

    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        pauses = sorted(await asyncio.gather(*[one(client, number) for number in range(500)]))
    return {"median_s": pauses[250], "p99_s": pauses[494], "worst_s": pauses[-1]}
