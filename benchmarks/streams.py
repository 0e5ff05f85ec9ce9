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
    """One answer; times are seconds from the moment in which it was asked for, or all were."""

    began_s: float = 0.0  # by ``time.perf_counter``
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
    start = time.perf_counter()
    answers = [Answer(start) for _ in requests]
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


class Callers:
    """Many callers who come one after the other, each over a connection of its own, in one thread."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._selector = selectors.DefaultSelector()
        self.answers: list[Answer] = []

    @property
    def num_under_way(self) -> int:
        return len(self._selector.get_map())

    def begin(self, request: bytes) -> None:
        answer = Answer(time.perf_counter())
        self.answers.append(answer)
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(self._address)
        self._selector.register(connection, selectors.EVENT_WRITE, [answer, answer.began_s, request])

    def step(self, limit_s: float) -> None:
        """Take what has come, or wait for it no longer than ``limit_s``."""
        for key, events in self._selector.select(limit_s):
            connection, state = key.fileobj, key.data
            if events & selectors.EVENT_WRITE:
                self._send(connection, state)  # type: ignore[arg-type]
            elif not _take(connection, state, state[0].began_s):  # type: ignore[arg-type]
                self._end(connection)  # type: ignore[arg-type]

    def _send(self, connection: socket.socket, state: list[Any]) -> None:
        try:
            connection.sendall(state.pop())  # it is small
        except OSError:  # refused before it was heard
            state[0].end_s = time.perf_counter() - state[0].began_s
            self._end(connection)
            return
        self._selector.modify(connection, selectors.EVENT_READ, state)

    def _end(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()

    def finish(self) -> list[Answer]:
        """All answers, once they have ended.

        Raises:
            TimeoutError: some had not after ``LIMIT_S``.
        """
        deadline = time.perf_counter() + LIMIT_S
        while self.num_under_way:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{self.num_under_way} answers have not ended after {LIMIT_S:g} s")
            self.step(1.0)
        self._selector.close()
        return self.answers
