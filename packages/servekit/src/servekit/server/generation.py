"""From checked requests to the engine's outputs, with nothing left behind when somebody leaves."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common_platform.errors import PlatformError, RequestError
from servekit.engine.async_engine import AsyncEngine, RequestStream, TextListener
from servekit.engine.output import RequestOutput
from servekit.engine.validate import MAX_CHARS_PER_TOKEN
from servekit.server.admission import Admission
from servekit.server.budgets import Budgets
from servekit.server.caller import Caller
from servekit.server.metrics import Metrics, RequestRecord
from servekit.server.protocol import GenerationRequest, Prompt
from servekit.server.structured import renamed

HearText = Callable[[str], None]
Hear = Callable[[int, RequestOutput | PlatformError], HearText | None]
LONG_TEXT = 8192  # characters; longer prompts are tokenized beside the event loop


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's prompts, and how errors name them."""

    request: GenerationRequest
    prompts: Sequence[Prompt]
    param_of: Sequence[str]
    add_special_tokens: bool


class Generation:
    """The engine's requests that together answer one HTTP request; ``close`` ends those still running."""

    def __init__(self, engine: AsyncEngine, admission: Admission, metrics: Metrics, budgets: Budgets) -> None:
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._budgets = budgets
        self._entered: str | None = None  # the tenant on whose account this runs
        self._records: list[RequestRecord] = []
        self._log: dict[str, Any] = {}
        self._failure = ""
        self._streams: list[RequestStream] = []
        self._engine_ids: list[str] = []

    async def open(self, job: Job, caller: Caller, hear: Hear | None = None) -> None:
        """Send all prompts to the engine, or none.

        Args:
            hear: is called with the index of the prompt and each output of it, or the error that ends it, in place of
                ``outputs()``: at once, so it must not raise or wait. What it returns is called in its place as long as
                a text of the prompt's only answer is all that is new.

        Raises:
            RequestError: one of them cannot be served; Overloaded, EngineDead: nothing can now.
        """
        self._log = caller.log
        try:
            self._admission.check_room()
            self._budgets.enter(caller.tenant)
            self._entered = caller.tenant
            for index, prompt in enumerate(job.prompts):
                self._streams.append(await self._add(job, index, prompt, caller, hear))
        except PlatformError as error:
            self._metrics.refused[error.code] += 1
            await self.close()
            if isinstance(error, RequestError):
                raise renamed(error, job.request.param_names) from error
            raise
        except BaseException:
            await self.close()
            raise

    async def _add(self, job: Job, index: int, prompt: Prompt, caller: Caller, hear: Hear | None) -> RequestStream:
        record = self._metrics.record()
        add_special_tokens = job.add_special_tokens
        if isinstance(prompt, str) and self._is_long(prompt):
            prompt = await asyncio.to_thread(
                self._engine.tokenizer.encode, prompt, add_special_tokens=add_special_tokens
            )
        engine_id = f"{caller.request_id}-{index}"
        self._engine_ids.append(engine_id)  # before it is there: leaving in between must end it too
        stream = await self._engine.add_request(
            engine_id,
            prompt,
            job.request.params,
            priority=job.request.priority,
            tenant=caller.tenant,
            cache_salt=salt_of(caller.tenant, job.request.cache_salt),
            add_special_tokens=add_special_tokens,
            timeout_s=self._admission.deadline_s(job.request.timeout_s),
            param=job.param_of[index],
            pooling=job.request.pooling,
            is_replayable=not job.request.stream,
            listener=None if hear is None else partial(self._heard, hear, index, record),
        )
        self._records.append(record)
        return stream

    def _heard(
        self, hear: Hear, index: int, record: RequestRecord, news: RequestOutput | PlatformError
    ) -> TextListener | None:
        if isinstance(news, RequestOutput):
            record.saw(news)
            failure = _failure_of(news)
            if failure is not None:
                news = failure
        if isinstance(news, PlatformError):
            self._failure = news.code
        hear_text = hear(index, news)
        if hear_text is None:
            return None

        def heard_text(text: str, num_tokens: int) -> None:
            record.saw_tokens(num_tokens)
            hear_text(text)

        return heard_text

    def _is_long(self, prompt: str) -> bool:
        return LONG_TEXT < len(prompt) <= self._engine.facts.max_model_len * MAX_CHARS_PER_TOKEN

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the prompt, output) as they come.

        Raises:
            EngineDead: the engine stopped; PlatformError: an answer failed.
        """
        try:
            if len(self._streams) == 1:
                async for output in self._streams[0]:
                    self._records[0].saw(output)
                    yield 0, _proper(output)
                return
            async for index, output in _merged(self._streams):
                self._records[index].saw(output)
                yield index, _proper(output)
        except PlatformError as error:
            self._failure = error.code
            raise

    async def close(self) -> None:
        """Ends of requests that have ended already cost nothing."""
        engine_ids, self._engine_ids = self._engine_ids, []
        self._settle()  # before anything is waited for: leaving in between must not lose it
        for engine_id in engine_ids:
            await self._engine.abort(engine_id)

    def _settle(self) -> None:
        """What was used goes to the metrics, the log and the caller's account."""
        reason = self._failure or self._log.get("finish", "client_gone")
        for stream, record in zip(self._streams, self._records, strict=False):
            record.cut_off(stream.request.sampling.n, reason)
        num_prompt = sum(record.num_prompt_tokens for record in self._records)
        num_generated = sum(record.num_generated_tokens for record in self._records)
        if self._records:
            self._count("prompt_tokens", num_prompt)
            self._count("completion_tokens", num_generated)
        if self._entered is not None:
            self._budgets.leave(self._entered, num_prompt + num_generated)
        self._streams, self._records, self._entered = [], [], None

    def _count(self, name: str, tokens: int) -> None:
        self._log[name] = self._log.get(name, 0) + tokens


async def _merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    queue: asyncio.Queue[tuple[int, RequestOutput | PlatformError | None]] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                queue.put_nowait((index, output))
            queue.put_nowait((index, None))
        except PlatformError as error:
            queue.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            index, news = await queue.get()
            if isinstance(news, PlatformError):
                raise news
            if news is None:
                running -= 1
            else:
                yield index, news
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _proper(output: RequestOutput) -> RequestOutput:
    failure = _failure_of(output)
    if failure is not None:
        raise failure
    return output


def _failure_of(output: RequestOutput) -> PlatformError | None:
    """Why a choice failed: half an answer is none."""
    for choice in output.outputs:
        if choice.finish_reason == "error":
            return PlatformError(message=f"request {output.request_id}: {choice.error}", code="internal_error")
        if choice.finish_reason == "timeout":
            return RequestError("timeout", "its end", "an answer in time", code="request_timeout", status=408)
    return None


def salt_of(tenant: str, cache_salt: str) -> str:
    """What separates prefix caches: tenants never share one, nor do different salts of a tenant."""
    if not tenant:
        return cache_salt
    tagged = b"tenant" + len(tenant).to_bytes(4, "big") + tenant.encode() + b"salt" + cache_salt.encode()
    return hashlib.sha256(tagged).hexdigest()
