"""Streams written as the news come: the same bytes as by the long way, whoever reads, however slowly."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.servekit.server.processes import PATIENCE_S, ServerProcess
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

from servekit.server.live import TextEvent
from servekit.server.streaming import event


@given(text=st.text(st.characters(codec="utf-8")))
def test_an_event_made_once_is_the_event_made_anew(text: str) -> None:
    def content(text: str) -> dict[str, Any]:
        return {"id": "a", "choices": [{"index": 0, "text": text, "logprobs": None}], "usage": None}

    assert TextEvent(content)(text) == event(content(text))


def raw_stream(server: ServerProcess, path: str, body: dict[str, Any], pause_s: float) -> list[dict[str, Any]]:
    """The events of a stream, read through a small window with pauses; every chunk holds whole events."""
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    answer = b""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + data)
        while not answer.endswith(b"0\r\n\r\n"):
            piece = connection.recv(2048)
            assert piece, answer[-200:]
            answer += piece
            time.sleep(pause_s)
    headers, _, rest = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200")
    events: list[str] = []
    while (size := int(rest.split(b"\r\n", 1)[0], 16)) > 0:
        start = rest.index(b"\r\n") + 2
        chunk, rest = rest[start : start + size], rest[start + size + 2 :]
        assert chunk.endswith(b"\n\n")
        parts = [part for part in chunk.decode().split("\n\n") if part]
        events += [part.removeprefix("data: ") for part in parts if not part.startswith(":")]  # which keeps it alive
    assert events[-1] == "[DONE]"
    return [json.loads(part) for part in events[:-1]]


def test_who_reads_slowly_gets_what_who_reads_fast_gets(server: ServerProcess) -> None:
    asked = {"max_tokens": 700, "ignore_eos": True, "temperature": 0.8, "seed": 3}
    cases = [(COMPLETIONS, completion(**asked), "text"), (CHAT, chat(**asked), "delta")]
    for path, body, kind in cases:

        def text_of(events: list[dict[str, Any]], kind: str = kind) -> str:
            parts = [choice[kind] for found in events for choice in found["choices"]]
            return "".join(part if isinstance(part, str) else part.get("content", "") for part in parts)

        fast, slow = raw_stream(server, path, body, 0.0), raw_stream(server, path, body, 0.002)
        with server.client() as client:
            whole = client.post(path, json=body).json()
        choice = whole["choices"][0]
        assert text_of(fast) == text_of(slow) == (choice["text"] if kind == "text" else choice["message"]["content"])
        for events in (fast, slow):
            assert events[-1]["usage"] == whole["usage"] | {
                "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"]
            }
            assert [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]] == ["length"]
            assert {json.dumps([e["id"], e["object"], e["model"]]) for e in events} == {
                json.dumps([events[0]["id"], events[0]["object"], "M"])
            }
