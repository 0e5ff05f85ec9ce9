"""What is below the routes: headers, bodies that do not come, connections that break."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.raw import connect, error_in, head, post_of, read_all
from tests.servekit.server.rows import COMPLETIONS, completion


@pytest.fixture(scope="module")
def strict(tiny_model: Path) -> Iterator[ServerProcess]:
    """Small bodies, two sequences at a time, two streams, one that waits."""
    flags = ("--max-body-bytes", "100000", "--max-num-seqs", "2", "--max-queue", "1", "--max-streams", "2")
    started = ServerProcess(tiny_model, *flags)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def hasty(tiny_model: Path) -> Iterator[ServerProcess]:
    """One second for everything: a test that stalls loses its connection, so it is only for what waits for that."""
    flags = ("--header-timeout-s", "1", "--body-timeout-s", "1", "--stream-stall-s", "1")
    started = ServerProcess(tiny_model, *flags)
    yield started
    started.stop()


def healthy(server: ServerProcess) -> bool:
    def says_so() -> bool:
        try:
            return httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        except httpx.TransportError:  # a second has passed between the connection and its request
            return False

    return wait_until(says_so) and server.engine() == server.engine_pid


def test_answers_carry_an_id_and_security_headers_and_no_server(http: httpx.Client) -> None:
    for response in (http.get("/health"), http.get("/nope"), http.post(COMPLETIONS, json={})):
        assert response.headers["x-request-id"].startswith("req-")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "server" not in response.headers
        assert "access-control-allow-origin" not in response.headers


def test_the_access_log_is_json_with_the_callers_label(server: ServerProcess, http: httpx.Client) -> None:
    forged = http.get("/health", headers={"X-Request-Id": 'x" evil'}).headers["x-request-id"]
    labelled = http.get("/version", headers={"X-Request-Id": "trace-7"}).headers["x-request-id"]
    assert wait_until(lambda: any(line["request_id"] == labelled for line in server.log_lines()))
    lines = {line["request_id"]: line for line in server.log_lines()}
    assert lines[labelled]["label"] == "trace-7"
    assert (lines[labelled]["status"], lines[labelled]["path"]) == (200, "/version")
    assert "label" not in lines[forged]


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/admin/status"])
def test_there_are_no_routes_that_nobody_asked_for(http: httpx.Client, path: str) -> None:
    assert http.get(path).json()["error"]["code"] == "not_found"


def test_a_body_is_refused_by_its_length_before_it_is_read(strict: ServerProcess) -> None:
    with connect(strict) as connection:
        connection.sendall(head("Content-Length: 100001"))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    error = error_in(answer)
    assert error["code"] == "body_too_large"
    assert "100001" in error["message"]
    assert "--max-body-bytes" in error["message"]


def test_a_chunked_body_is_cut_at_the_limit(strict: ServerProcess) -> None:
    with connect(strict) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        try:
            for _ in range(120):
                connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(connection)
    assert b"413" in answer[:20] or b"408" in answer[:20]
    assert healthy(strict)


def test_a_slow_body_is_answered_408(hasty: ServerProcess) -> None:  # srv-026, and 200 of them in test_bad_moments
    with connect(hasty) as connection:
        connection.sendall(head("Content-Length: 100") + b"{")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    assert b"--body-timeout-s" in answer
    assert healthy(hasty)


def test_slow_headers_end_the_connection(hasty: ServerProcess) -> None:  # srv-027
    with connect(hasty) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(b"POST /v1/comp")
        assert read_all(connection) == b""
    assert healthy(hasty)


@pytest.mark.parametrize("lines", [b"X: " + b"a" * (10 << 20), b"\r\n".join(b"a%d: 12345" % i for i in range(10_000))])
def test_large_headers_are_answered_431(strict: ServerProcess, lines: bytes) -> None:  # srv-028, srv-029
    with connect(strict) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"--max-header-bytes" in answer
    assert healthy(strict)


def test_a_truncated_body_never_reaches_the_engine(strict: ServerProcess) -> None:  # srv-031
    before = len(strict.log_lines())
    with connect(strict) as connection:
        connection.sendall(head("Content-Length: 100") + b"x" * 50)
    assert wait_until(lambda: any(line["status"] == 499 for line in strict.log_lines()[before:]))
    assert healthy(strict)


def test_a_full_queue_is_refused_at_once(strict: ServerProcess) -> None:  # srv-179
    """At once is before the engine has moved at all: it stands still meanwhile."""
    body = completion(max_tokens=1000, ignore_eos=True)
    with strict.client() as client, contextlib.ExitStack() as held, strict.frozen():
        for number, more in enumerate(({"stream": True}, {"stream": True}, {}), start=1):
            if number == 3:
                refused = client.post(COMPLETIONS, json=body | {"stream": True})
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
                assert "--max-streams" in refused.json()["error"]["message"]
            held.enter_context(connect(strict)).sendall(post_of(body | more))
            assert wait_until(lambda number=number: strict.requests() == number)
        refused = client.post(COMPLETIONS, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 5
        held.close()
        assert wait_until(lambda: strict.requests() == 0)
    with strict.client() as client:
        assert client.post(COMPLETIONS, json=completion()).status_code == 200


def test_who_does_not_read_is_cut_off(hasty: ServerProcess) -> None:  # srv-183
    body = completion(prompt=[5] * 1000, n=16, echo=True, logprobs=20, stream=True)

    def is_cut_off() -> bool:
        return any(line.get("finish") == "slow_client" for line in hasty.log_lines())

    def not_read() -> bool:
        """Once more where the test stalled before it had sent all."""
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", hasty.port))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(post_of(body))
            return wait_until(is_cut_off, 20)

    assert wait_until(not_read)
    assert healthy(hasty)
