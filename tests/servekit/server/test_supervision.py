"""``kill -9`` of the engine: told at once, never hidden, mended within seconds."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.servekit.server.processes import PATIENCE_S, ServerProcess, is_alive, wait_until
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

from servekit.engine.supervisor import RestartPolicy, Restarts

READY_AGAIN_S = 60  # the promise is 10 on a machine of its own, and test_storms': tests share theirs
LONG = completion(max_tokens=1000, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def hardy(tiny_model: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(tiny_model, "--max-engine-restarts", "1000", "--pooling", "last")
    yield started
    started.stop()


@pytest.fixture
def movable(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A server, and its model's folder: while that is away no engine can be started."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    started = ServerProcess(folder, "--max-engine-restarts", "1000")
    yield started, folder
    started.stop()


@contextlib.contextmanager
def away(folder: Path) -> Iterator[None]:
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(folder)


def kill(server: ServerProcess) -> int:
    """The process id of the engine that is no more."""
    return server.signal_engine(signal.SIGKILL)


def status(server: ServerProcess, path: str = "/health") -> int:
    return httpx.get(f"{server.url}{path}", timeout=60).status_code


def test_streams_break_with_an_error_and_health_says_so_until_it_is_mended(
    movable: tuple[ServerProcess, Path],
) -> None:  # srv-184
    server, folder = movable
    with server.client() as client, away(folder):

        def breaks() -> bool:
            """Once more where the answer had ended before the engine did."""
            if status(server) != 200:
                return False
            with client.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                kill(server)
                told = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            if "[DONE]" in told:
                elsewhere.rename(folder)
                assert wait_until(lambda: status(server) == 200, READY_AGAIN_S)
                folder.rename(elsewhere)
                return False
            assert json.loads(told[-1])["error"]["code"] == "engine_dead"
            return True

        elsewhere = folder.with_name("elsewhere")
        assert wait_until(breaks)
        for answer in (client.get("/health"), client.post(COMPLETIONS, json=completion())):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
            assert int(answer.headers["retry-after"]) >= 1
        assert 'servekit:engine_ready{model_name="M"} 0.0' in client.get("/metrics").text
    assert wait_until(lambda: status(server) == 200, READY_AGAIN_S)
    assert "error" not in httpx.post(f"{server.url}{COMPLETIONS}", json=completion(), timeout=60).json()


@pytest.mark.slow
def test_a_stream_learns_of_the_end_within_two_seconds(movable: tuple[ServerProcess, Path]) -> None:
    """srv-184, and its times: on a machine of its own."""
    server, folder = movable
    with server.client() as client, away(folder):
        with client.stream("POST", COMPLETIONS, json=LONG | {"stream": True, "n": 4}) as response:
            lines = response.iter_lines()
            next(lines)
            kill(server)
            killed = time.monotonic()
            assert wait_until(lambda: status(server) == 503, 1)
            assert "engine_dead" in [line for line in lines if line][-1]
            assert time.monotonic() - killed < 2


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
        with hardy.frozen():
            for thread in threads:
                thread.start()
            assert wait_until(lambda: hardy.requests() == 4)
        time.sleep(0.1)  # in which they begin, and seldom end
        kill(hardy)
        for thread in threads:
            thread.join(2 * PATIENCE_S)
    for found, whole in zip(answers, wanted, strict=True):
        assert [choice.get("text", choice.get("message")) for choice in found["choices"]] == [
            choice.get("text", choice.get("message")) for choice in whole["choices"]
        ]
        assert found["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


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
            assert wait_until(lambda: hardy.engine() not in (0, gone[-1]) and status(hardy) == 200, READY_AGAIN_S)
        stop.set()
        watcher.join(2 * PATIENCE_S)
        assert not lied
        assert httpx.post(f"{hardy.url}{COMPLETIONS}", json=completion(), timeout=60).status_code == 200
    assert not any(Path(f"/proc/{pid}").exists() for pid in gone), "a zombie is left"
    assert len(hardy.running("servekit.engine.process")) == 1
    text = httpx.get(f"{hardy.url}/metrics").text
    assert "servekit:engine_restarts_total" in text


def test_an_engine_that_dies_too_often_ends_the_server(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--max-engine-restarts", "1")
    try:
        first = kill(server)
        assert wait_until(lambda: server.engine() not in (0, first) and status(server) == 200, READY_AGAIN_S)
        second = kill(server)
        assert server.wait() == 1
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
