"""Server-sent events: one a change, a last one with the usage, and [DONE] only when all is complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.responses import StreamingResponse

from common_platform.errors import PlatformError, RequestError
from servekit.engine.async_engine import RequestStream
from servekit.server.errors import body_of
from servekit.server.state import ServerState, close_all

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
encode = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    return b"data: " + encode(body) + b"\n\n"


def sse(
    state: ServerState, request_id: str, chunks: AsyncIterator[Any], streams: Sequence[RequestStream]
) -> StreamingResponse:
    """A response that sends ``chunks`` as events; when the caller goes away, ``streams`` end in the engine.

    Raises:
        RequestError: 429, too many streams are open.
    """
    if state.open_streams >= state.limits.max_streams:
        limit = f"{state.limits.max_streams} at once"
        raise RequestError(
            "stream", state.open_streams, limit, code="too_many_streams", flag="--max-streams", status=429
        )
    state.open_streams += 1
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(state, request_id, chunks, streams), 200, headers, "text/event-stream")


async def _events(
    state: ServerState, request_id: str, chunks: AsyncIterator[Any], streams: Sequence[RequestStream]
) -> AsyncIterator[bytes]:
    following = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(chunks, None))
            done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE_S)
            if not done:
                yield KEEP_ALIVE
                continue
            chunk, following = following.result(), None
            if chunk is None:
                break
            yield event(chunk)
        yield DONE
    except PlatformError as error:
        yield event(body_of(error, request_id)[1])
    finally:
        state.open_streams -= 1
        if following is not None:
            following.cancel()
        await close_all(streams)
