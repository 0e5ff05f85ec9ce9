"""The door to chat templates: each is rendered in a child process that a deadline can kill.

The deadline is of processor time, which the child's own timer counts: a machine that is slow for others' sake refuses
no chat. One that stands still altogether is given up by the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common_platform.errors import PlatformError, RequestError, ResourceError
from servekit.engine.chat_template import missing
from servekit.server.template import ChatModel
from servekit.server.template_child import TIMES_UP

START_TIMEOUT_S = 60.0
CLOCK_PER_PROCESSOR_S = 10.0  # how much longer than its processor time a job may take by the clock
LIMIT = "chat_template_limit"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    timeout_s: float = 2.0  # of processor time
    max_chars: int = 64 << 20  # of a rendered text
    memory_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """What is to be rendered; ``source`` is the caller's own template, where one was given."""

    messages: Sequence[Json]
    tools: Sequence[Json] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None


class Templates:
    """Renders the model's own template in one child, and those of callers in another, so that neither waits for both.

    A child lives on from job to job; at a deadline it is killed and the next job starts another.
    """

    def __init__(self, model: ChatModel, limits: TemplateLimits) -> None:
        self._model = model
        self._limits = limits
        self._own = _Child(model, limits)
        self._foreign = _Child(model, limits)

    async def render(self, prompt: ChatPrompt) -> str:
        """The text of a chat.

        Raises:
            RequestError: the template refuses it, or a caller's own takes too much.
            PlatformError: the model's own template takes too much, code ``chat_template_limit``.
        """
        is_own = prompt.source is None
        if is_own and self._model.source is None:
            raise missing()
        answer = await (self._own if is_own else self._foreign).ask(
            {
                "messages": prompt.messages,
                "tools": prompt.tools,
                "add_generation_prompt": prompt.add_generation_prompt,
                "continue_final_message": prompt.continue_final_message,
                "variables": prompt.variables,
                "source": prompt.source,
            }
        )
        if "text" in answer:
            text: str = answer["text"]
            return text
        raise _error_of(answer, is_own=is_own, limits=self._limits)

    async def start(self) -> None:
        """Have the first chat find its child ready.

        Raises:
            ResourceError: there is none.
        """
        if self._model.source is not None:
            await self._own.start()

    async def close(self) -> None:
        await self._own.close()
        await self._foreign.close()


def _error_of(answer: Json, *, is_own: bool, limits: TemplateLimits) -> PlatformError:
    code, param = answer["code"], answer.get("param")
    if param is not None:
        return RequestError(param, code=code, message=answer["message"])
    param = "messages" if is_own else "chat_template"
    whose = "the model's chat template refused them" if is_own else "it cannot be rendered"
    if code == LIMIT:
        limit = f"{limits.timeout_s:g} s and {limits.max_chars} characters; change with --template-timeout-s"
        message = f"{param}: {answer['message']}; allowed {limit}"
        return (PlatformError if is_own else RequestError)(param, code=code, message=message)
    return RequestError(param, code=code, message=f"{param}: {whose}: {answer['message']}")


class _Child:
    def __init__(self, model: ChatModel, limits: TemplateLimits) -> None:
        self._setup = {
            "source": model.source,
            "special": model.special,
            "timeout_s": limits.timeout_s,
            "max_chars": limits.max_chars,
            "memory_bytes": limits.memory_bytes,
        }
        self._timeout_s = limits.timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def ask(self, job: Json) -> Json:
        async with self._turn:
            process = await self._started()
            try:
                async with asyncio.timeout(CLOCK_PER_PROCESSOR_S * self._timeout_s):
                    return await _exchange(process, job)
            except TimeoutError:
                await self._kill()
                return self._too_slow
            except (OSError, asyncio.IncompleteReadError):  # its timer ended it, or the system at its memory limit
                await self._kill()
                if process.returncode == -TIMES_UP:
                    return self._too_slow
                return {"code": LIMIT, "message": "it needs too much memory"}
            except BaseException:  # the caller left in between: what the child says now is for nobody
                await asyncio.shield(self._kill())
                raise

    @property
    def _too_slow(self) -> Json:
        return {"code": LIMIT, "message": f"not rendered within {self._timeout_s:g} s"}

    async def start(self) -> None:
        async with self._turn:
            await self._started()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise ResourceError("messages", "closed", "an open server", code="closed")
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self._kill()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "servekit.server.template_child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await _exchange(self._process, self._setup)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            await self._kill()
            raise ResourceError("messages", "the rendering process did not start", code="child_failed") from error
        except BaseException:
            await asyncio.shield(self._kill())
            raise
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def close(self) -> None:
        self._closed = True
        await self._kill()


async def _exchange(process: asyncio.subprocess.Process, job: Json) -> Json:
    if process.stdin is None or process.stdout is None:
        raise BrokenPipeError
    body = json.dumps(job).encode()
    process.stdin.write(struct.pack("<I", len(body)) + body)
    await process.stdin.drain()
    size = struct.unpack("<I", await process.stdout.readexactly(4))[0]
    answer: Json = json.loads(await process.stdout.readexactly(size))
    return answer
