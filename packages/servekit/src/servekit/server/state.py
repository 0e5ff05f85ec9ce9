"""What every route of one server shares."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from common_platform.errors import Overloaded, PlatformError, RequestError
from servekit.engine.async_engine import AsyncEngine, RequestStream
from servekit.engine.output import RequestOutput
from servekit.sampling.parameters import SamplingParams
from servekit.server.errors import not_found
from servekit.server.json_body import parse_object
from servekit.server.limits import ServerLimits


@dataclass
class ServerState:
    """The engine, its name, the limits, and what is open now."""

    engine: AsyncEngine
    model_name: str
    limits: ServerLimits
    ignore_unknown_fields: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    open_streams: int = 0
    draining: bool = False

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise not_found(name, "model_not_found", "model")

    async def read_body(self, request: Request) -> dict[str, object]:
        """The request's JSON object.

        Raises:
            RequestError: 400, 408, 413 or 415.
        """
        self._check_headers(request)
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                data = await self._read(request)
        except TimeoutError as error:
            limit = f"{self.limits.body_timeout_s:g} s"
            raise RequestError(
                None, "a slow body", limit, code="request_timeout", flag="--body-timeout-s", status=408
            ) from error
        return parse_object(data, self.limits)

    def _check_headers(self, request: Request) -> None:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(None, encoding, "identity", code="unsupported_content_encoding", status=415)
        kind, _, parameters = request.headers.get("content-type", "").partition(";")
        if kind.strip().lower() != "application/json":
            found = kind or "no content type"
            raise RequestError(None, found, "application/json", code="unsupported_media_type", status=415)
        charset = parameters.partition("charset=")[2].strip(" \"'").lower()
        if charset not in ("", "utf-8", "utf8"):
            raise RequestError(None, charset, "utf-8", code="unsupported_charset", status=415)
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            raise self._too_large(int(length))

    def _too_large(self, size: int) -> RequestError:
        limit = f"at most {self.limits.max_body_bytes} bytes"
        return RequestError(None, f"{size} bytes", limit, code="body_too_large", flag="--max-body-bytes", status=413)

    async def _read(self, request: Request) -> bytes:
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > self.limits.max_body_bytes:
                raise self._too_large(len(data))
        return bytes(data)

    # --- requests to the engine ---

    def admit(self) -> None:
        """Room for one more request.

        Raises:
            Overloaded: the queue is full.
        """
        most = self.limits.max_queue + self.engine.config.max_num_seqs
        if self.draining:
            raise Overloaded(message="the server is shutting down", code="draining")
        if self.engine.num_requests >= most:
            raise Overloaded(
                "requests", self.engine.num_requests, f"{self.limits.max_queue} waiting", flag="--max-queue"
            )

    async def submit(
        self, request_id: str, prompts: Sequence[tuple[str, str | list[int]]], params: SamplingParams, **about: object
    ) -> list[RequestStream]:
        """One engine request a prompt; all of them, or none."""
        self.admit()
        streams: list[RequestStream] = []
        try:
            for index, (name, prompt) in enumerate(prompts):
                streams.append(
                    await self.engine.add_request(f"{request_id}-{index}", prompt, params, param=name, **about)
                )
        except PlatformError:
            await close_all(streams)
            raise
        return streams


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"


async def close_all(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        await stream.aclose()


async def merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of several streams as they come, each with the index of its stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | PlatformError | None]] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                queue.put_nowait((index, output))
            queue.put_nowait((index, None))
        except PlatformError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, news = await queue.get()
            if isinstance(news, PlatformError):
                raise news
            if news is None:
                left -= 1
            else:
                yield index, news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(request: Request, streams: Sequence[RequestStream]) -> list[RequestOutput] | None:
    """The last output of every stream; None where the caller has gone away, and then they are aborted."""

    async def all_of_them() -> list[RequestOutput]:
        last: dict[int, RequestOutput] = {}
        answers: dict[int, dict[int, object]] = {}
        async for index, output in merged(streams):
            last[index] = output
            for answer in output.outputs:
                answers.setdefault(index, {})[answer.index] = answer
        for index, output in last.items():
            output.outputs = [answers[index][i] for i in sorted(answers[index])]  # type: ignore[misc]
        return [last[index] for index in range(len(streams))]

    work = asyncio.ensure_future(all_of_them())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, PlatformError, ClientDisconnect):
            await asyncio.gather(work, gone)
        await close_all(streams)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
