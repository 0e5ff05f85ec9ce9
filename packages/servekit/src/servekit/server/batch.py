"""``servekit run-batch``: a file of requests in OpenAI's batch form, answered without a network."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp, Message

from common_platform.errors import ConfigError
from servekit.engine.async_engine import AsyncEngine
from servekit.engine.config import EngineConfig
from servekit.server.app import build_app, guarded
from servekit.server.config import ServerConfig

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/score")
Json = dict[str, Any]


@dataclass(slots=True)
class Counts:
    """Lines by how they ended."""

    answered: int = 0
    failed: int = 0


def run_batch(engine: EngineConfig, config: ServerConfig, source: Path, target: Path) -> Counts:
    """Answer every line of ``source`` and write the answers to ``target``, in the same order.

    ``target`` appears when all is done; what is wrong with a line stands in its answer.

    Raises:
        ConfigError: a file cannot be read or written.
        ArtifactError: the model cannot be used.
    """
    if target.exists():
        raise ConfigError("output", target.name, "a file that is not there yet", flag="--output")
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with source.open("rb") as lines, partial.open("xb") as made:
            counts = asyncio.run(_run(engine, config, lines, made))
            made.flush()
            os.fsync(made.fileno())
        partial.rename(target)
        return counts
    except OSError as error:
        name = Path(str(error.filename or target)).name
        raise ConfigError("input or output", name, "a file that can be read or written") from error
    finally:
        partial.unlink(missing_ok=True)


async def _run(engine_config: EngineConfig, config: ServerConfig, lines: IO[bytes], made: IO[bytes]) -> Counts:
    counts = Counts()
    engine = await AsyncEngine.from_config(engine_config)
    try:
        app = build_app(engine, config)
        door = guarded(app, config)
        try:
            async for answer in _answers(door, _lines(lines, config), 4 * engine_config.max_num_seqs):
                is_good = answer["error"] is None and answer["response"]["status_code"] == 200
                counts.answered += is_good
                counts.failed += not is_good
                made.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        finally:
            await app.state.server.templates.close()
    finally:
        await engine.shutdown()
    return counts


def _lines(lines: IO[bytes], config: ServerConfig) -> Iterator[bytes]:
    """Lines that are not empty; what is longer than a body may be is cut, and refused as it is no JSON then."""
    most = config.limits.max_body_bytes
    while line := lines.readline(most):
        if line.strip():
            yield line


async def _answers(door: ASGIApp, lines: Iterator[bytes], at_once: int) -> AsyncIterator[Json]:
    """In the order of the lines, of which ``at_once`` are under way."""
    under_way: deque[asyncio.Task[Json]] = deque()
    try:
        for line in lines:
            under_way.append(asyncio.create_task(_answer(door, line)))
            if len(under_way) >= at_once:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _answer(door: ASGIApp, line: bytes) -> Json:
    made: Json = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": None, "response": None, "error": None}
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        return made | {"error": {"code": "invalid_json", "message": "the line is not a JSON object"}}
    if not isinstance(asked, dict):
        return made | {"error": {"code": "invalid_json", "message": "the line is not a JSON object"}}
    custom_id = asked.get("custom_id")
    made["custom_id"] = custom_id if isinstance(custom_id, str) else None
    fault = _fault_of(asked)
    if fault is not None:
        return made | {"error": fault}
    status, headers, body = await _ask(door, asked["url"], json.dumps(asked["body"]).encode())
    request_id = headers.get(b"x-request-id", b"").decode()
    return made | {"response": {"status_code": status, "request_id": request_id, "body": json.loads(body)}}


def _fault_of(asked: Json) -> Json | None:
    if not isinstance(asked.get("custom_id"), str):
        return {"code": "missing_field", "message": "custom_id: got nothing; allowed a string"}
    if asked.get("method", "POST") != "POST":
        return {"code": "unsupported", "message": "method: allowed POST"}
    if asked.get("url") not in URLS:
        return {"code": "unsupported", "message": f"url: allowed one of {', '.join(URLS)}"}
    if not isinstance(asked.get("body"), dict):
        return {"code": "invalid_type", "message": "body: allowed an object"}
    if asked["body"].get("stream"):
        return {"code": "unsupported", "message": "body.stream: allowed false in a batch"}
    return None


async def _ask(door: ASGIApp, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request to the app: status, headers and body of its answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: Json = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
    }
    unread = [body]
    said: list[Message] = []

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.Event().wait()  # the caller does not leave
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        said.append(message)

    await door(scope, receive, send)
    begun = next(message for message in said if message["type"] == "http.response.start")
    content = b"".join(message.get("body", b"") for message in said if message["type"] == "http.response.body")
    return begun["status"], dict(begun["headers"]), content
