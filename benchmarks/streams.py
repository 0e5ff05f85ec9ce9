"""Many streamed answers at once for little: one thread, raw sockets, and hardly anything parsed."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PIECE = 1 << 16
TAIL = 2048  # bytes of an answer's end that are kept
LIMIT_S = 300.0


@dataclass(slots=True)
class Answer:
    """One answer; times are seconds from the moment in which all were asked."""

    first_s: float = 0.0  # the first event; 0: there was none
    end_s: float = 0.0
    longest_gap_s: float = 0.0  # between two arrivals
    num_arrivals: int = 0
    head: bytes = b""
    tail: bytes = b""

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1]) if self.head else 0

    @property
    def is_whole(self) -> bool:
        return b"data: [DONE]" in self.tail

    @property
    def num_tokens(self) -> int:
        """By the usage at its end."""
        _, found, rest = self.tail.rpartition(b'"completion_tokens":')
        return int(rest.lstrip().split(b",", 1)[0].rstrip(b"}")) if found else 0


def post(path: str, body: dict[str, Any]) -> bytes:
    """A request after whose answer the connection ends."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + data


def ask_all(port: int, requests: Sequence[bytes]) -> list[Answer]:
    """Every request over a connection of its own, all at once.

    Raises:
        TimeoutError: one had not ended after ``LIMIT_S``.
    """
    answers = [Answer() for _ in requests]
    start = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for request, answer in zip(requests, answers, strict=True):
            connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, [answer, start])
        while selector.get_map():
            ready = selector.select(LIMIT_S)
            if not ready or time.perf_counter() - start > LIMIT_S:
                raise TimeoutError(f"{len(selector.get_map())} answers have not ended after {LIMIT_S:g} s")
            for key, _ in ready:
                if not _take(key.fileobj, key.data, start):  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return answers


def _take(connection: socket.socket, state: list[Any], start: float) -> bool:
    """Read what is there; False at the end."""
    answer, last = state
    try:
        piece = connection.recv(PIECE)
    except ConnectionResetError:
        piece = b""
    now = time.perf_counter()
    if not piece:
        answer.end_s = now - start
        return False
    if not answer.head:
        answer.head = piece[:64]
    if not answer.first_s and b"data:" in piece:
        answer.first_s = now - start
    answer.longest_gap_s = max(answer.longest_gap_s, now - last)
    state[1] = now
    answer.num_arrivals += 1
    answer.tail = (answer.tail + piece)[-TAIL:]
    return True
