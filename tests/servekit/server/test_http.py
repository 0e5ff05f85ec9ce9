"""What is below the routes: headers, bodies that do not come, connections that break."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.rows import COMPLETIONS, completion

FLAGS = ("--header-timeout-s", "1", "--body-timeout-s", "1", "--max-body-bytes", "100000", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def strict(tiny_model: Path) -> Iterator[ServerProcess]:
    """Short times, small bodies, two sequences at a time."""
    started = ServerProcess(tiny_model, *FLAGS, "--max-queue", "1", "--max-streams", "2", "--stream-stall-s", "1")
    yield started
    started.stop()


def connect(server: ServerProcess) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    made.settimeout(10)
    return made


def head(length: int | str, *more: str) -> bytes:
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    lines += [f"Content-Length: {length}"] if length != "" else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def healthy(server: ServerProcess) -> bool:
    with server.client() as client:
        return client.get("/health").status_code == 200 and server.engine() == server.engine_pid


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
        connection.sendall(head(100_001))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "body_too_large"
    assert "100001" in error["message"]
    assert "--max-body-bytes" in error["message"]


def test_a_chunked_body_is_cut_at_the_limit(strict: ServerProcess) -> None:
    with connect(strict) as connection:
        connection.sendall(head("", "Transfer-Encoding: chunked"))
        try:
            for _ in range(120):
                connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(connection)
    assert b"413" in answer[:20] or b"408" in answer[:20]
    assert healthy(strict)


def test_a_slow_body_is_answered_408(strict: ServerProcess) -> None:  # srv-026, and 200 of them in test_bad_moments
    with connect(strict) as connection:
        connection.sendall(head(100) + b"{")
        started = time.monotonic()
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    assert b"--body-timeout-s" in answer
    assert time.monotonic() - started < 3


def test_slow_headers_end_the_connection(strict: ServerProcess) -> None:  # srv-027
    with connect(strict) as connection:
        connection.sendall(b"POST /v1/comp")
        started = time.monotonic()
        assert read_all(connection) == b""
    assert time.monotonic() - started < 3


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
        connection.sendall(head(100) + b"x" * 50)
    assert wait_until(lambda: any(line["status"] == 499 for line in strict.log_lines()[before:]))
    assert healthy(strict)


def test_a_full_queue_is_refused_at_once(strict: ServerProcess) -> None:  # srv-179
    body = completion(max_tokens=1000, ignore_eos=True)
    with httpx.Client(base_url=strict.url, timeout=30) as client:
        streams = [client.stream("POST", COMPLETIONS, json=body | {"stream": True}) for _ in range(2)]
        opened = [stream.__enter__() for stream in streams]
        assert [response.status_code for response in opened] == [200, 200]
        response = client.post(COMPLETIONS, json=body | {"stream": True})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_streams")
        assert "--max-streams" in response.json()["error"]["message"]
        with connect(strict) as third:
            data = json.dumps(body).encode()
            third.sendall(head(len(data)) + data)
            time.sleep(0.2)
            response = client.post(COMPLETIONS, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_overloaded")
        assert 1 <= int(response.headers["retry-after"]) <= 5
        assert response.elapsed.total_seconds() < 0.25
        for stream in streams:
            stream.__exit__(None, None, None)
        assert wait_until(lambda: client.post(COMPLETIONS, json=completion()).status_code == 200)


def test_who_does_not_read_is_cut_off(strict: ServerProcess) -> None:  # srv-183
    body = completion(prompt=[5] * 1000, n=16, echo=True, logprobs=20, stream=True)
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", strict.port))
    with connection:
        connection.sendall(head(len(data)) + data)
        assert wait_until(lambda: any(line.get("finish") == "slow_client" for line in strict.log_lines()), 15)
    assert healthy(strict)
