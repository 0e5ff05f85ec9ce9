"""Our own bugs: answered without a word about the inside, told in full to the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.types import Message, Receive, Scope, Send

from common_platform.errors import ArtifactError, EngineDead, PlatformError
from servekit.server import errors, streaming
from servekit.server.middleware import Envelope
from servekit.server.streaming import EventStream, event

SECRET = "secret at /tmp/place 0xdeadbeef"


async def failing_events(failure: Exception) -> AsyncGenerator[bytes, None]:
    yield event({"text": "a"})
    raise failure


async def refused_events(failure: Exception) -> AsyncGenerator[bytes, None]:
    raise failure
    yield b""


def get(path: str, failure: Exception) -> httpx.Response:
    app = FastAPI()

    @app.get("/fails")
    async def fails() -> Response:
        raise failure

    @app.get("/breaks")
    async def breaks() -> Response:
        return EventStream(failing_events(failure), 1.0)

    @app.get("/refuses")
    async def refuses(request: Request) -> Response:
        return EventStream(refused_events(failure), 1.0)

    errors.install(app)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Envelope(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(path)

    return asyncio.run(ask())


@pytest.mark.parametrize("failure", [ValueError(SECRET), PlatformError(message=SECRET), ArtifactError("f", SECRET)])
@pytest.mark.parametrize("path", ["/fails", "/refuses"])
def test_a_bug_is_a_500_that_names_only_the_request(
    path: str, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        response = get(path, failure)
    request_id = response.headers["x-request-id"]
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": f"internal error, id {request_id}",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert request_id in caplog.text
    assert SECRET in caplog.text


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ValueError(SECRET), "internal_error"),
        (PlatformError(message=SECRET), "internal_error"),
        (EngineDead(), "engine_dead"),
    ],
)
def test_a_stream_that_breaks_ends_with_an_error_and_without_done(failure: Exception, code: str) -> None:
    response = get("/breaks", failure)
    assert response.status_code == 200
    told = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert json.loads(told[0]) == {"text": "a"}
    assert json.loads(told[-1])["error"]["code"] == code
    assert len(told) == 2
    assert SECRET not in response.text


def test_while_nothing_comes_a_comment_keeps_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.05)

    seen = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        await seen.wait()
        yield event({"text": "a"})

    app = FastAPI()

    @app.get("/slow")
    async def answer() -> Response:
        return EventStream(slow(), 60.0)

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if b"keep-alive" in message.get("body", b""):
                seen.set()
            await send(message)

        await Envelope(app)(scope, receive, sent)

    async def ask() -> str:
        transport = httpx.ASGITransport(watched)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/slow")).text

    parts = asyncio.run(ask()).split("\n\n")
    assert parts[0] == ": keep-alive"
    assert parts[-3:] == ['data: {"text":"a"}', "data: [DONE]", ""]


def test_a_stream_refused_before_its_first_event_has_a_status_of_its_own() -> None:
    response = get("/refuses", EngineDead(message=SECRET))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert response.headers["retry-after"] == "1"
    assert SECRET not in response.text
