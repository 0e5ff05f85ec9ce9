"""Callers that leave, an engine that dies, and how a server ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.canary import held_by
from tests.servekit.server.processes import ServerProcess, is_alive, wait_until
from tests.servekit.server.raw import connect, post_of
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
    """A server for one test, which may break it. It is patient: what ends sooner did not wait for that."""
    started = ServerProcess(tiny_model, "--shutdown-timeout-s", "600")
    yield started
    started.stop()


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def gone(server: ServerProcess) -> int:
    return sum(line.get("finish") == "client_gone" for line in server.log_lines())


def unanswered(server: ServerProcess) -> int:
    return sum(line["status"] == 499 for line in server.log_lines())


def aborted(client: httpx.Client) -> float:
    """Sequences that the server counts as cut off because of their callers."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "request_aborted_total" in line and "client_gone" in line)


@pytest.mark.parametrize(("path", "n"), [(COMPLETIONS, 2), (CHAT, 1)])
def test_a_caller_who_leaves_amid_a_stream_ends_the_request(lasting: ServerProcess, path: str, n: int) -> None:
    """srv-181. Four times: what was left running would fill the server."""
    body = chat(max_tokens=900, ignore_eos=True) if path == CHAT else LONG
    with lasting.client() as client:
        for number in range(gone(lasting), gone(lasting) + 4):
            before = aborted(client)

            def leave(number: int = number) -> bool:
                """An answer that had ended before the caller left is no case of this."""
                seen = len(lasting.log_lines())
                with client.stream("POST", path, json=body | {"n": n, "stream": True}) as response:
                    next(response.iter_lines())
                assert wait_until(lambda: any(line["path"] == path for line in lasting.log_lines()[seen:]))
                return gone(lasting) > number

            assert wait_until(leave)
            assert aborted(client) > before
            assert wait_until(lambda: not any(held_by(client)), 5)
            assert lasting.requests() == 0


def test_callers_who_leave_before_the_first_token_free_the_whole_server(lasting: ServerProcess) -> None:
    """Six long requests fill it while nothing moves, and all leave: nothing is left for the engine to do."""
    before = unanswered(lasting)
    with lasting.client() as client:
        with lasting.frozen():
            with contextlib.ExitStack() as held:
                for _ in range(6):
                    held.enter_context(connect(lasting)).sendall(post_of(LONG))
                assert wait_until(lambda: lasting.requests() == 6)
                assert client.post(COMPLETIONS, json=completion()).status_code == 503
            assert wait_until(lambda: lasting.requests() == 0)
        assert client.post(COMPLETIONS, json=completion()).status_code == 200
        assert wait_until(lambda: not any(held_by(client)), 5)
    assert wait_until(lambda: unanswered(lasting) == before + 6)


def test_an_engine_that_hangs_is_not_healthy(lasting: ServerProcess) -> None:  # srv-185
    def health() -> int:
        return httpx.get(f"{lasting.url}/health", timeout=60).status_code

    with lasting.frozen():
        assert wait_until(lambda: health() == 503, 8)
        assert httpx.get(f"{lasting.url}/health", timeout=60).json()["error"]["code"] == "engine_stalled"
    assert wait_until(lambda: health() == 200, 6)


def takes_calls(server: ServerProcess) -> bool:
    try:
        httpx.get(f"{server.url}/health", timeout=60)
    except httpx.TransportError:
        return False
    return True


def begun(server: ServerProcess, client: httpx.Client, held: contextlib.ExitStack) -> httpx.Response:
    """A stream that has begun and cannot end while ``held``: the engine stands still."""
    found: list[httpx.Response] = []

    def begin() -> bool:
        """Once more where it had ended before the engine stood still."""
        with contextlib.ExitStack() as mine:
            body = LONG | {"stream": True, "n": 4}
            response = mine.enter_context(client.stream("POST", COMPLETIONS, json=body))
            assert response.status_code == 200
            mine.enter_context(server.frozen())
            found.append(response)
            if not wait_until(lambda: server.requests() == 0, 0.3):
                held.enter_context(mine.pop_all())
                return True
        return False

    assert wait_until(begin)
    return found[-1]


def test_sigterm_lets_answers_end_and_takes_no_more(own: ServerProcess) -> None:  # cli-018
    with own.client() as client, contextlib.ExitStack() as still:
        response = begun(own, client, still)
        own.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: not takes_calls(own))
        assert own.process.poll() is None, "it waits for the answer"
        os.kill(own.engine_pid, signal.SIGCONT)
        assert events(response)[-1] == "[DONE]"
    assert own.wait() == 0
    assert not is_alive(own.engine_pid)


def test_a_second_signal_cuts_off_at_once(own: ServerProcess) -> None:  # cli-019
    """Not for the answer, which does not come, nor for the ten minutes it has."""
    with own.client() as client, contextlib.ExitStack() as still:
        response = begun(own, client, still)
        own.process.send_signal(signal.SIGINT)
        assert wait_until(lambda: not takes_calls(own))
        assert own.end(signal.SIGINT) == 130
        told = events(response)
    assert json.loads(told[-1])["error"]["code"] == "engine_dead"
    assert "[DONE]" not in told
    assert not is_alive(own.engine_pid)


@pytest.mark.slow
def test_two_signals_end_it_within_two_seconds(own: ServerProcess) -> None:
    """cli-019, and its time: on a machine of its own."""
    with own.client() as client, contextlib.ExitStack() as still:
        begun(own, client, still)
        own.process.send_signal(signal.SIGINT)
        assert wait_until(lambda: not takes_calls(own))
        own.process.send_signal(signal.SIGINT)
        assert wait_until(lambda: own.process.poll() == 130, 2)


def test_what_does_not_end_in_time_is_cut_off_and_the_status_tells(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--drain-s", "1")
    try:
        with server.client() as client, contextlib.ExitStack() as still:
            response = begun(server, client, still)
            assert server.end() == 143
            assert json.loads(events(response)[-1])["error"]["code"] == "engine_dead"
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
