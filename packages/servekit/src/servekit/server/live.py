"""Streams that cost no task a token: events are written to the connection in the moment in which the news come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from common_platform.errors import PlatformError
from servekit.engine.output import RequestOutput
from servekit.server.generation import Hear, HearText
from servekit.server.http import ChunkWriter
from servekit.server.streaming import OPENAI, EventStream, StreamForm, event

_MARK = "\N{BLACK HEART SUIT}here\N{BLACK HEART SUIT}"
_encode = msgspec.json.Encoder().encode


class LiveAnswer(Protocol):
    """An answer that is made of outputs as they come."""

    async def open(self, hear: Hear) -> None:
        """Send its requests to the engine; ``hear`` is called with all news."""

    def take(self, prompt: int, output: RequestOutput) -> bytes:
        """The events of what ``output`` adds."""

    def text_event(self, prompt: int) -> TextEvent | None:
        """What makes an event of more text of the only choice of ``prompt``; None where outputs must be taken."""

    @property
    def is_whole(self) -> bool:
        """Whether all outputs have been taken."""

    def last(self) -> bytes:
        """The events after all others."""

    async def close(self) -> None:
        """End what still runs."""


class LiveStream(EventStream):
    """Sends the events of ``answer``.

    The first ones go the usual way, by a task, and so do all while the caller reads slowly: they are held until it has
    read. Between, ``_hear`` writes them.

    Args:
        place: held while the stream is open.
    """

    def __init__(
        self, answer: LiveAnswer, place: AbstractContextManager[None], stall_s: float, form: StreamForm = OPENAI
    ) -> None:
        super().__init__(self._held_events(place), stall_s, form)
        self._answer = answer
        self._writer: ChunkWriter | None = None
        self._is_direct = False
        self._held: list[bytes] = []
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._is_over = False
        self._clock = self._loop.time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._writer = scope["state"].get("chunk_writer")
        await super().__call__(scope, receive, send)

    async def _held_events(self, place: AbstractContextManager[None]) -> AsyncGenerator[bytes, None]:
        try:
            with place:
                await self._answer.open(self._hear)
                while not self._is_over:
                    await self._wake.wait()
                    self._wake.clear()
                    while self._held:
                        held, self._held = self._held, []
                        yield b"".join(held)
                    self._is_direct = self._writer is not None
                if self._failure is not None:
                    raise self._failure
                if last := self._answer.last():
                    yield last
        finally:
            self._is_over = True
            await self._answer.close()

    def _hear(self, prompt: int, news: RequestOutput | PlatformError) -> HearText | None:
        """Called by the engine's client: quick, and it never raises. What it returns hears mere text, once a step."""
        if self._is_over:
            return None
        try:
            if isinstance(news, PlatformError):
                raise news
            events = self._answer.take(prompt, news)
        except Exception as error:  # noqa: BLE001 - raised again by the task that answers
            self._failure = error
            self._end()
            return None
        if self._answer.is_whole:
            self._held.append(events)
            self._end()
            return None
        if events:
            self._pass_on(events)
        text_event = self._answer.text_event(prompt)
        return None if text_event is None else partial(self._hear_text, text_event)

    def _hear_text(self, text_event: TextEvent, text: str) -> None:
        if text and not self._is_over:
            self._pass_on(text_event(text))

    def _pass_on(self, events: bytes) -> None:
        writer = self._writer
        if self._is_direct and writer is not None and writer.write(events):
            self._since = self._clock()
            return
        self._is_direct = False
        self._held.append(events)
        self._wake.set()

    def _end(self) -> None:
        self._is_over, self._is_direct = True, False
        self._wake.set()


class TextEvent:
    """An event in which nothing but one text changes: made once, so that a token costs no more than its escaping.

    Args:
        content_with: the content of the event with that text in it.
    """

    def __init__(self, content_with: Callable[[str], Any]) -> None:
        self._before, self._after = event(content_with(_MARK)).split(_encode(_MARK))

    def __call__(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, _encode(text), self._after)
