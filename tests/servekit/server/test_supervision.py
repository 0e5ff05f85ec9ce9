"""``kill -9`` of the engine: told at once, never hidden, mended within seconds."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.servekit.server.processes import ServerProcess, is_alive, wait_until
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

from servekit.engine.supervisor import RestartPolicy, Restarts

READY_AGAIN_S = 30  # the promise is 10 on a machine of its own: tests share theirs
LONG = completion(max_tokens=1000, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def hardy(tiny_model: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(tiny_model, "--max-engine-restarts", "1000", "--pooling", "last")
    yield started
    started.stop()


def kill(server: ServerProcess) -> int:
    """The process id of the engine that is no more."""
    pid = server.engine()
    os.kill(pid, signal.SIGKILL)
    return pid


def status(server: ServerProcess, path: str = "/health") -> int:
    return httpx.get(f"{server.url}{path}", timeout=5).status_code


def test_streams_break_with_an_error_and_health_says_so_at_once(hardy: ServerProcess) -> None:  # srv-184
    with hardy.client() as client, client.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        kill(hardy)
        killed = time.monotonic()
        told = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert time.monotonic() - killed < 2
        assert json.loads(told[-1])["error"]["code"] == "engine_dead"
        assert "[DONE]" not in told
        health, refused = client.get("/health"), client.post(COMPLETIONS, json=completion())
        for answer in (health, refused):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
            assert int(answer.headers["retry-after"]) >= 1
        assert "servekit:engine_ready{" in client.get("/metrics").text
    assert wait_until(lambda: status(hardy) == 200, READY_AGAIN_S)
    assert "error" not in httpx.post(f"{hardy.url}{COMPLETIONS}", json=completion()).json()


def test_requests_that_nobody_has_seen_a_word_of_begin_again(hardy: ServerProcess) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, LONG | {"n": 2, "logprobs": 1}),
        (COMPLETIONS, LONG | {"prompt": ["a", "b"], "max_tokens": 500}),
        (CHAT, chat(max_tokens=900, ignore_eos=True, temperature=0)),
    ]
    with hardy.client() as client:
        wanted = [client.post(path, json=body).json() for path, body in asked]
        answers: list[dict[str, Any]] = [{}] * len(asked)

        def ask(index: int) -> None:
            path, body = asked[index]
            answers[index] = client.post(path, json=body).json()

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: running(hardy) == 5)
        time.sleep(0.1)
        kill(hardy)
        for thread in threads:
            thread.join(30)
    for found, whole in zip(answers, wanted, strict=True):
        assert [choice.get("text", choice.get("message")) for choice in found["choices"]] == [
            choice.get("text", choice.get("message")) for choice in whole["choices"]
        ]
        assert found["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def running(server: ServerProcess) -> int:
    text = httpx.get(f"{server.url}/metrics", timeout=5).text
    lines = [line for line in text.splitlines() if line.startswith("servekit:num_requests_running{")]
    return int(float(lines[0].split()[-1]))


def test_kills_at_random_moments_leave_nothing_behind(hardy: ServerProcess) -> None:
    chance = random.Random(5)
    gone = []
    for _ in range(4):
        stop = threading.Event()
        lied: list[str] = []

        def watch(stop: threading.Event = stop, lied: list[str] = lied) -> None:
            """Health that is 200 means an engine that answers."""
            while not stop.is_set():
                before = hardy.engine()
                was_dead = not (before and is_alive(before))  # asked first: it may be killed while health is asked
                if was_dead and status(hardy) == 200 and hardy.engine() == before:
                    lied.append("healthy without an engine")

        watcher = threading.Thread(target=watch)
        watcher.start()
        with hardy.client() as client, client.stream("POST", CHAT, json=chat(max_tokens=900, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            time.sleep(chance.random() * 0.3)
            gone.append(kill(hardy))
            killed = time.monotonic()
            assert wait_until(lambda: status(hardy) == 503, 1)
            assert wait_until(lambda: status(hardy) == 200, READY_AGAIN_S)
            assert time.monotonic() - killed < READY_AGAIN_S
        stop.set()
        watcher.join(10)
        assert not lied
        assert httpx.post(f"{hardy.url}{COMPLETIONS}", json=completion(), timeout=20).status_code == 200
    assert not any(Path(f"/proc/{pid}").exists() for pid in gone), "a zombie is left"
    assert sum(b"servekit.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in hardy.children()) == 1
    text = httpx.get(f"{hardy.url}/metrics").text
    assert "servekit:engine_restarts_total" in text


def test_an_engine_that_dies_too_often_ends_the_server(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--max-engine-restarts", "1")
    try:
        first = kill(server)
        assert wait_until(lambda: server.engine() not in (0, first) and status(server) == 200, READY_AGAIN_S)
        second = kill(server)
        assert server.wait(5) == 1
        assert not is_alive(second)
        assert any("--max-engine-restarts" in line for line in server.said)
    finally:
        server.stop()


def test_starts_that_do_not_help_come_slower_and_end() -> None:
    now = [0.0]
    restarts = Restarts(RestartPolicy(max_restarts=4, window_s=100), clock=lambda: now[0])
    delays = [restarts.next_delay_s() for _ in range(5)]
    assert delays[0] == 0
    assert delays[1:4] == sorted(delays[1:4])
    assert delays[1] < delays[3]
    assert delays[4] is None
    now[0] = 101
    assert restarts.next_delay_s() == 0
