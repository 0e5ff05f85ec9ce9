"""Callers that leave, an engine that dies, and how a server ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.processes import ServerProcess, is_alive, wait_until
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

LONG = completion(max_tokens=1000, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def lasting(tiny_model: Path) -> Iterator[ServerProcess]:
    """A small server for tests that leave it as it was."""
    started = ServerProcess(tiny_model, "--max-num-seqs", "2", "--max-queue", "4")
    yield started
    started.stop()


@pytest.fixture
def own(tiny_model: Path) -> Iterator[ServerProcess]:
    """A server for one test, which may break it."""
    started = ServerProcess(tiny_model, "--shutdown-timeout-s", "20")
    yield started
    started.stop()


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def test_a_caller_who_leaves_frees_what_the_request_held(lasting: ServerProcess) -> None:  # srv-181
    """Six long requests fill the server; were any left running, the seventh would be refused or wait for seconds."""
    with lasting.client() as client:
        for path, body in ((COMPLETIONS, LONG | {"n": 2}), (CHAT, chat(max_tokens=900, ignore_eos=True))):
            for _ in range(3):
                with client.stream("POST", path, json=body | {"stream": True}) as response:
                    next(response.iter_lines())
        for _ in range(6):
            with pytest.raises(httpx.ReadTimeout):
                client.post(COMPLETIONS, json=LONG, timeout=0.05)
        assert wait_until(lambda: sum(line["status"] == 499 for line in lasting.log_lines()) == 6)
        started = time.monotonic()
        assert client.post(COMPLETIONS, json=completion()).status_code == 200
        assert time.monotonic() - started < 1
    gone = [line for line in lasting.log_lines() if line.get("finish") == "client_gone"]
    assert len(gone) == 6


def test_an_engine_that_hangs_is_not_healthy(lasting: ServerProcess) -> None:  # srv-185
    def health() -> int:
        return httpx.get(f"{lasting.url}/health").status_code

    os.kill(lasting.engine_pid, signal.SIGSTOP)
    try:
        assert health() == 200
        assert wait_until(lambda: health() == 503, 8)
        assert httpx.get(f"{lasting.url}/health").json()["error"]["code"] == "engine_stalled"
    finally:
        os.kill(lasting.engine_pid, signal.SIGCONT)
    assert wait_until(lambda: health() == 200, 6)


def test_sigterm_lets_answers_end_and_takes_no_more(own: ServerProcess) -> None:  # cli-018
    with own.client() as client:
        with client.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as response:
            own.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{own.url}/health")
            assert events(response)[-1] == "[DONE]"
    assert own.wait() == 0
    assert not is_alive(own.engine_pid)


def test_a_second_signal_cuts_off_at_once(own: ServerProcess) -> None:  # cli-019
    with own.client() as client, client.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as response:
        own.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        started = time.monotonic()
        assert own.end(signal.SIGINT) == 130
        assert time.monotonic() - started < 2
        told = events(response)
    assert json.loads(told[-1])["error"]["code"] == "engine_dead"
    assert "[DONE]" not in told
    assert not is_alive(own.engine_pid)


def test_what_does_not_end_in_time_is_cut_off_and_the_status_tells(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--drain-s", "1")
    try:
        body = LONG | {"stream": True, "n": 4}
        with server.client() as client, client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()  # held: a dropped iterator closes the connection
            next(lines)
            assert server.end() == 143
            assert "engine_dead" in [line for line in lines if line][-1]
        assert not is_alive(server.engine_pid)
    finally:
        server.stop()


def test_kill_9_of_the_server_ends_the_engine(own: ServerProcess) -> None:
    own.process.kill()
    own.wait()
    assert wait_until(lambda: not is_alive(own.engine_pid), 5)


def test_a_request_without_a_timeout_has_the_servers(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--max-request-timeout-s", "0.05")
    try:
        with server.client() as client:
            answer = client.post(COMPLETIONS, json=LONG | {"n": 4})
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")
            more = client.post(COMPLETIONS, json=LONG | {"timeout": 1.0})
            assert (more.status_code, more.json()["error"]["param"]) == (400, "timeout")
    finally:
        server.stop()
