"""Raw bytes that are no HTTP, or almost some: answered or hung up on, never with a 500, and nobody else is hurt."""

from __future__ import annotations

import errno
import json
import random
import select
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.servekit.server.canary import canary
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.raw import connect, read_all
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

WAITS_S = 0.7
JSON = "Content-Type: application/json"
BODIES = {
    COMPLETIONS: json.dumps(completion()).encode(),
    CHAT: json.dumps(chat(max_tokens=2, stream=True)).encode(),
    "/v1/responses": b'{"model":"M","input":"hi","max_output_tokens":2}',
    "/v1/messages": b'{"model":"M","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}',
    "/tokenize": b'{"model":"M","prompt":"hi"}',
    "/v1/embeddings": b'{"model":"M","input":"hi"}',
}
PATHS = [
    "/",
    "/health",
    "/metrics",
    "/v1/models",
    "/openapi.json",
    "*",
    "http://x/health",
    "/%00",
    "//",
    "/v1/../health",
]
Chance = random.Random


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode("latin-1", "replace")


def good(chance: Chance) -> bytes:
    """A request that is right: what the others are made of."""
    if chance.random() < 0.2:
        return head("GET", chance.choice(PATHS))
    path, body = chance.choice(list(BODIES.items()))
    if chance.random() < 0.3:
        middle = chance.randrange(len(body))
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:middle], body[middle:]) if part)
        return head("POST", path, JSON, "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n"
    return head("POST", path, JSON, f"Content-Length: {len(body)}") + body


def damaged(chance: Chance) -> bytes:
    return hurt(good(chance), chance)


def hurt(whole: bytes, chance: Chance) -> bytes:
    """A few bytes are changed, lost, added or cut off."""
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(data) or 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.randint(1, 40)]
            case 2:
                data[at:at] = chance.randbytes(chance.randint(1, 20))
            case 3:
                data[at:at] = chance.choice([b"\r\n", b"\r\n\r\n", b"\x00", b"\n", b": ", b"HTTP/9.9", b"\xff\xfe"])
            case _:
                del data[at:]
    return bytes(data)


def hurt_body(chance: Chance) -> bytes:
    """HTTP that is right, around JSON that is not."""
    path, body = chance.choice(list(BODIES.items()))
    body = hurt(body, chance)
    return head("POST", path, JSON, "Connection: close", f"Content-Length: {len(body)}") + body


def framed_twice(chance: Chance) -> bytes:
    """Lengths that contradict one another: what smugglers send."""
    body = chance.choice(list(BODIES.values()))
    lengths = ["0", "-1", "+5", "5, 6", "0x10", "1e3", str(len(body)), "99999999999999999999", "", " ", "5 5", "\xb2"]
    lines = [f"Content-Length: {chance.choice(lengths)}" for _ in range(chance.randint(1, 3))]
    codings = ["chunked", "gzip, chunked", "chunked, chunked", "identity", "xchunked", "Chunked ", "chunked;a=b"]
    lines += [f"Transfer-Encoding: {chance.choice(codings)}" for _ in range(chance.randint(0, 2))]
    chance.shuffle(lines)
    return head("POST", chance.choice(list(BODIES)), JSON, *lines) + body + b"GET /health HTTP/1.1\r\n\r\n"


def chunked_wrongly(chance: Chance) -> bytes:
    sizes = [b"-1", b"ffffffffffffffff", b"fffffffffffffffff", b"5;" + b"x" * 300, b"g", b"", b"0x5", b"5 ", b"\r"]
    body = (
        chance.choice(sizes) + b"\r\n" + chance.randbytes(chance.randint(0, 30)) + chance.choice([b"\r\n", b"\n", b""])
    )
    tail = chance.choice([b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0\r\n", b""])
    return head("POST", COMPLETIONS, JSON, "Transfer-Encoding: chunked") + body + tail


def odd_line(chance: Chance) -> bytes:
    methods = ["GET", "get", "P\u00d6ST", "TRACE", "CONNECT", "PRI", "OPTIONS", "X" * 200, "", " ", "GET\t", "HEAD"]
    versions = ["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1 x", "", "http/1.1", "HTTP/1.99999999999"]
    line = f"{chance.choice(methods)} {chance.choice([*PATHS, *BODIES])} {chance.choice(versions)}\r\n"
    names = ["Host", "X Y", "Content-Length ", ":", "\x00", "Authorization", "Expect", "Upgrade", "Connection", "é"]
    values = ["x", "\x00", "\x0b", "a\rb", "100-continue", "websocket", "close, upgrade", "\xff" * 50, ""]
    fields = "".join(f"{chance.choice(names)}: {chance.choice(values)}\r\n" for _ in range(chance.randint(0, 6)))
    return (line + fields + "\r\n").encode("latin-1")


def noise(chance: Chance) -> bytes:
    hello = b"\x16\x03\x01" + chance.randbytes(40)  # TLS where there is none
    second = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(20)
    return chance.choice([hello, second, chance.randbytes(chance.randint(1, 200)), b"\r\n" * 20, b"\x00" * 50])


def several(chance: Chance) -> bytes:
    """One behind the other on a connection, the last of them broken."""
    return b"".join(good(chance) for _ in range(chance.randint(1, 3))) + damaged(chance)


KINDS: list[Callable[[Chance], bytes]] = [
    *[damaged] * 4,
    *[hurt_body] * 3,
    framed_twice,
    chunked_wrongly,
    odd_line,
    noise,
    several,
]


def send(server: ServerProcess, data: bytes, *, waits: bool) -> list[int]:
    """The statuses of the answers; none where the connection was closed without one.

    Args:
        waits: a little for what comes; then, or else at once, the sending half is closed, and with it the request.
    """
    found: list[int] = []
    with connect(server) as sent:
        answer = b""
        try:
            sent.sendall(data)
            while waits and select.select([sent], [], [], WAITS_S)[0] and (piece := sent.recv(65536)):
                answer += piece
            sent.shutdown(socket.SHUT_WR)
            answer += read_all(sent)
        except (ConnectionResetError, BrokenPipeError):
            pass
        except OSError as error:
            assert error.errno == errno.ENOTCONN, "the other end has closed already"
    for part in answer.split(b"HTTP/1.1 ")[1:]:
        if part[:3].isdigit():
            found.append(int(part[:3]))
    return found


def barrage(server: ServerProcess, count: int) -> Counter[int]:
    """``count`` requests from a few callers at once; statuses, 0 for no answer."""

    def one(number: int) -> list[int]:
        chance = Chance(number)
        return send(server, chance.choice(KINDS)(chance), waits=chance.random() < 0.4) or [0]

    with ThreadPoolExecutor(16) as pool:
        return Counter(status for statuses in pool.map(one, range(count)) for status in statuses)


@pytest.fixture(scope="module")
def sturdy(tiny_model: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(tiny_model, "--pooling", "last", "--log-level", "error", "--max-num-seqs", "32")
    yield started
    started.stop()


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_malformed_requests_break_nothing(sturdy: ServerProcess, count: int) -> None:
    with sturdy.client() as client:
        before = canary(client)
        seen = barrage(sturdy, count)
        print(json.dumps({"statuses": seen}))
        assert not seen[500], seen
        assert seen[400] > count / 10
        assert seen[200] > 0
        assert canary(client) == before
    assert sturdy.engine() == sturdy.engine_pid
    assert not [line for line in sturdy.said if "Traceback" in line], "".join(sturdy.said[-40:])


def test_a_request_behind_another_that_is_no_http_ends_both_cleanly(sturdy: ServerProcess) -> None:
    """The first is under way when the second comes: its answer, or a 400, and never one within the other."""
    body = json.dumps(completion(max_tokens=900, ignore_eos=True)).encode()
    first = head("POST", COMPLETIONS, JSON, f"Content-Length: {len(body)}") + body
    assert send(sturdy, first + b"\x00\x01 nonsense\r\n\r\n", waits=True) == [400]
    with sturdy.client() as client:
        canary(client)
    assert not any("Traceback" in line for line in sturdy.said)


def test_a_caller_with_two_requests_on_the_way_may_leave(sturdy: ServerProcess) -> None:
    body = json.dumps(completion(max_tokens=900, ignore_eos=True)).encode()
    one = head("POST", COMPLETIONS, JSON, f"Content-Length: {len(body)}") + body
    with sturdy.client() as client:
        before = canary(client)
        with sturdy.frozen():
            with connect(sturdy) as sent:
                sent.sendall(one + one)
                assert wait_until(lambda: sturdy.requests() == 1)
            assert wait_until(lambda: sturdy.requests() == 0), "the first goes on for nobody"
        assert canary(client) == before
