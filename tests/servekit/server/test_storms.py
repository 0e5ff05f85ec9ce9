"""Many at once, and much nonsense: minutes each, so run by ``nox -s slow``; a short storm runs always."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.servekit.server.processes import PATIENCE_S, ServerProcess, is_alive, wait_until
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


@dataclass(frozen=True, slots=True)
class Look:
    """At ``/health``, and right after it at how often the engine has been started again."""

    began: float
    status: int
    num_restarts: int


class Watch:
    """Looks at a server all the time, in a thread of its own, until it is left."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._is_over = threading.Event()
        self.looks: list[Look] = []

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._server.client() as public, self._server.management() as management:
            while not self._is_over.wait(0.002):
                began = time.monotonic()
                status = public.get("/health").status_code
                restarts = management.get("/admin/status").json()["engine_restarts"]
                self.looks.append(Look(began, status, restarts))


def kill_and_wait(server: ServerProcess) -> tuple[float, float]:
    """When the engine was dead, and when the server had answered a request again."""
    pid = server.signal_engine(signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))
    dead = time.monotonic()
    with server.client() as client:
        assert wait_until(lambda: client.get("/health").status_code == 200, 10)
        assert client.post(COMPLETIONS, json=completion(max_tokens=2)).status_code == 200, "who is ready serves"
    return dead, time.monotonic()


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_health_is_never_ready_without_an_engine(sturdy: ServerProcess, kills: int) -> None:
    """P3. A look that begins when the engine is dead says so, until another one has been started.

    Right at every moment: the server counts an engine that it started before it calls itself ready again, so who was
    told "ready" of a new engine and asks after that finds it counted.
    """
    chance = random.Random(7)
    before = held(sturdy)
    with sturdy.management() as client:
        num_before = client.get("/admin/status").json()["engine_restarts"]
    with Watch(sturdy) as watch:
        moments = []
        for _ in range(kills):
            time.sleep(chance.random() * 0.5)
            moments.append(kill_and_wait(sturdy))
        num_looks = len(watch.looks)
        assert wait_until(lambda: len(watch.looks) > num_looks)
    for number, (dead, _) in enumerate(moments, start=1):
        lies = [k for k in watch.looks if k.began >= dead and k.status == 200 and k.num_restarts < num_before + number]
        assert not lies, (number, lies[:5])
    unready = sum(look.status == 503 for look in watch.looks)
    assert {look.status for look in watch.looks} <= {200, 503}
    assert wait_until(lambda: held(sturdy) == before), (before, held(sturdy))
    assert len(sturdy.running("servekit.engine.process")) == 1
    taken = sorted(ready - dead for dead, ready in moments)
    figures = {"median": taken[len(taken) // 2], "worst": taken[-1]}
    print(json.dumps({"kills": kills, "answers_again_s": figures, "looks": len(watch.looks), "not_ready": unready}))


SURVIVORS = 20  # one caller in so many stays
STREAMED = HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close")


async def leave(server: ServerProcess, chance: random.Random) -> None:
    """Ask for much, and leave at some moment: at once, after a byte of the answer, or by closing one half."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = completion(prompt=f"left {chance.random()}", max_tokens=900, ignore_eos=True, stream=True)
    data = json.dumps(body).encode()
    writer.write(STREAMED % len(data) + data)
    await writer.drain()
    moment = chance.choice(("before", "middle", "half"))
    if moment == "middle":
        await reader.read(chance.randint(1, 2000))
    else:
        await asyncio.sleep(chance.random())
    if moment == "half":
        writer.write_eof()
        await reader.read(-1)
    if chance.random() < 0.5:
        writer.transport.abort()
    await gone(writer)


async def gone(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def stay(server: ServerProcess, number: int) -> str:
    """The text of a stream, which must be whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = completion(prompt=f"stays {number}", max_tokens=40, ignore_eos=True, stream=True, temperature=0)
    data = json.dumps(body).encode()
    writer.write(STREAMED % len(data) + data)
    lines = [line async for line in reader if line.startswith(b"data: ")]
    await gone(writer)
    assert lines[-1] == b"data: [DONE]\n", lines[-1:]
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])


async def abort_storm(server: ServerProcess, count: int, seed: int) -> list[str]:
    """What those who stayed were told."""
    chance = random.Random(seed)
    callers = [stay(server, i // SURVIVORS) if i % SURVIVORS == 0 else leave(server, chance) for i in range(count)]
    async with asyncio.timeout(5 * PATIENCE_S):
        return [told for told in await asyncio.gather(*callers) if told is not None]


async def quiet(server: ServerProcess, count: int) -> list[str]:
    return [await stay(server, number) for number in range(count)]


@pytest.mark.parametrize(("count", "seeds"), [(60, 1), pytest.param(1000, 5, marks=pytest.mark.slow)])
def test_an_abort_storm_leaves_nothing_behind(tiny_model: Path, count: int, seeds: int) -> None:
    """P2: nineteen in twenty leave; the others read what they read on a quiet day, and nothing is held afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * count + 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))  # the server's too, which inherits
    flags = ("--deterministic", "--max-streams", "2000", "--max-queue", "2000", "--log-level", "error")
    server = ServerProcess(tiny_model, *flags)
    try:
        with server.client() as client:

            def kv_usage() -> float:
                lines = client.get("/metrics").text.splitlines()
                return float(
                    next(line for line in lines if line.startswith("servekit:kv_cache_usage_perc")).split()[-1]
                )

            calm = asyncio.run(quiet(server, count // SURVIVORS))
            assert kv_usage() == 0
            process = psutil.Process(server.process.pid)
            files, threads = process.num_fds(), process.num_threads()
            for seed in range(seeds):
                assert asyncio.run(abort_storm(server, count, seed)) == calm
                assert wait_until(lambda: server.requests() == 0, 2), "requests are left"
                assert wait_until(lambda: kv_usage() == 0, 2), "blocks are left"
                assert wait_until(lambda: process.num_fds() <= files, 5), "descriptors are left"
            assert process.num_threads() <= threads + 6  # of the pool for what waits, which is as large as it gets
    finally:
        server.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
