"""HTTP by hand: requests in pieces, cut off, or left alone, and what comes back for them."""

from __future__ import annotations

import json
import select
import socket
from typing import Any

from tests.servekit.server.processes import PATIENCE_S, ServerProcess
from tests.servekit.server.rows import COMPLETIONS


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)


def head(*lines: str, path: str = COMPLETIONS) -> bytes:
    """Of a POST of JSON, up to the empty line."""
    every = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return ("\r\n".join(every) + "\r\n\r\n").encode()


def post_of(body: dict[str, Any], *lines: str, path: str = COMPLETIONS) -> bytes:
    data = json.dumps(body).encode()
    return head(f"Content-Length: {len(data)}", *lines, path=path) + data


def read_all(connection: socket.socket) -> bytes:
    """Until the other end closes, or cuts off."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def has_answer(connection: socket.socket) -> bool:
    """Whether something can be read from it now."""
    return bool(select.select([connection], [], [], 0)[0])


def error_in(answer: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error
