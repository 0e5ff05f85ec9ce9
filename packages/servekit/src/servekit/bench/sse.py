"""One streamed answer over HTTP/1.1: when each of its events came, and what they held."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from common_platform.errors import ConfigError

PIECE = 1 << 16
MAX_HEADERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, base_url: str, endpoint: str) -> Address:
        """Raises ConfigError where ``base_url`` is no address of a server."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("base_url", base_url, "http://HOST:PORT or https://HOST", flag="--base-url")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, parts.path.rstrip("/") + endpoint, tls)


@dataclass(slots=True)
class Record:
    """What became of a request; times in seconds by ``time.perf_counter``."""

    began: float = 0.0
    first: float = 0.0  # the first event with text; 0: none came
    last: float = 0.0  # the last one
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between events with text
    num_events: int = 0  # with text
    num_input: int = 0
    num_output: int = 0
    status: int = 0
    error: str = ""
    is_whole: bool = False  # [DONE] came

    @property
    def succeeded(self) -> bool:
        return self.is_whole and not self.error

    def saw_text(self) -> None:
        now = time.perf_counter()
        if self.first:
            self.gaps.append(now - self.last)
        else:
            self.first = now
        self.last = now
        self.num_events += 1


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content or delta.tool_calls)))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


async def ask(address: Address, body: bytes, headers: dict[str, str], limit_s: float) -> Record:
    """Send ``body`` and follow the answer to its end. Whatever goes wrong stands in the record."""
    record = Record(began=time.perf_counter())
    try:
        async with asyncio.timeout(limit_s):
            await _follow(address, body, headers, record)
    except TimeoutError:
        record.error = f"no end after {limit_s:g} s"
    except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.ended = time.perf_counter()
    if record.succeeded and not record.num_output:  # a server without usage: an event is a token
        record.num_output = record.num_events
    return record


async def _follow(address: Address, body: bytes, headers: dict[str, str], record: Record) -> None:
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls, limit=PIECE * 16)
    try:
        about = {"Host": f"{address.host}:{address.port}", "Content-Type": "application/json"} | headers
        lines = [f"POST {address.path} HTTP/1.1", *(f"{name}: {value}" for name, value in about.items())]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""])
        writer.write(head.encode() + body)
        await writer.drain()
        status, answer = await _head(reader)
        record.status = status
        pieces = _chunks(reader) if answer.get("transfer-encoding", "").lower() == "chunked" else _pieces(reader)
        if status != 200:
            record.error = f"{status}: {(b''.join([piece async for piece in pieces]))[:200].decode(errors='replace')}"
            return
        await _events(pieces, record)
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
    return int(lines[0].split(" ", 2)[1]), {name.strip().lower(): value.strip() for name, value in fields.items()}


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(PIECE):
        yield piece


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";", 1)[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _events(pieces: AsyncIterator[bytes], record: Record) -> None:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                _take(line[5:].strip(), record)


def _take(data: bytes, record: Record) -> None:
    if data == b"[DONE]":
        record.is_whole = True
        return
    event = _decode(data)
    if event.error is not None:
        record.error = bytes(event.error)[:200].decode(errors="replace")
    if any(choice.has_text for choice in event.choices):
        record.saw_text()
    if event.usage is not None:
        record.num_input, record.num_output = event.usage.prompt_tokens, event.usage.completion_tokens or 0
