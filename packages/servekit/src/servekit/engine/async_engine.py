"""The engine for servers: its loop in a process of its own, its answers as async streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from common_platform import errors
from common_platform.errors import EngineDead, PlatformError, RequestError
from servekit.core.facts import ModelFacts
from servekit.core.prompt_embeds import PromptEmbeds
from servekit.core.stats import SchedulerStats
from servekit.engine import messages as m
from servekit.engine.config import EngineConfig
from servekit.engine.grammars import GrammarDoor
from servekit.engine.output import OutputProcessor, RequestOutput, RequestTracker
from servekit.engine.supervisor import RestartPolicy, Restarts
from servekit.engine.tokenizer import Tokenizer
from servekit.engine.tracing import RequestTracer
from servekit.engine.validate import EngineRequest, validate
from servekit.sampling.parameters import SamplingParams

log = logging.getLogger("servekit.engine")
STOP_LIMIT_S = 10.0
ASK_LIMIT_S = 30.0
SEND_LIMIT_S = 2.0  # a live process takes a message at once
MOST_AT_ONCE = 32  # messages; then other tasks have their turn

TextListener = Callable[[str, int], None]  # the text that is new, and of how many tokens
Listener = Callable[[RequestOutput | PlatformError], TextListener | None]


def rebuilt(about: dict[str, Any]) -> PlatformError:
    """An error that another process described, as the class it was there."""
    kind = getattr(errors, str(about.get("type")), PlatformError)
    if not (isinstance(kind, type) and issubclass(kind, PlatformError)):
        kind = PlatformError
    error: PlatformError = kind(
        about.get("param"),
        about.get("value"),
        about.get("limit"),
        code=about.get("code"),
        flag=about.get("flag"),
        message=about.get("message"),
    )
    return error


def _waiting(socket: zmq.Socket[bytes]) -> Iterator[m.FromEngine]:
    """What has come meanwhile: where this process is behind, several steps are taken in at once."""
    for _ in range(MOST_AT_ONCE):
        if not int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return
        yield m.decode_from_engine(socket.recv(zmq.NOBLOCK))


class RequestStream:
    """The outputs of one request, for one reader. ``aclose`` ends the request in the engine.

    What comes while nobody asks is one output when somebody does, so a slow reader costs no memory.

    Args:
        prompt: its text, where it came as one.
        is_replayable: the caller can take its outputs from the start again, should the engine die in between.
        listener: is called with all news at once, in place of the iteration. What it returns is called in its place
            from then on, as long as a text of the only answer is all that is new.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        request: EngineRequest,
        prompt: str | None,
        *,
        is_replayable: bool = False,
        listener: Listener | None = None,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.is_replayable = is_replayable
        self.listener = listener
        self.tracker: RequestTracker | None = None
        self._hears_text: TextListener | None = None
        self._has_begun = False
        self._engine = engine
        self._has_news = asyncio.Event()
        self._error: PlatformError | None = None
        self._done = False

    @property
    def may_begin_again(self) -> bool:
        return self.is_replayable or not self._has_begun

    def moved(self) -> None:
        """There is something to take."""
        self._has_begun = True
        if self.listener is None:
            self._has_news.set()
        elif self.tracker is not None:
            if self._hears_text is not None and (news := self.tracker.take_text()) is not None:
                self._hears_text(*news)
            elif (output := self.tracker.take()) is not None:
                self._hears_text = self.listener(output)

    def fail(self, error: PlatformError) -> None:
        """What is there can still be taken; then this is raised."""
        self._has_begun = True
        self._error = error
        if self.listener is None:
            self._has_news.set()
            return
        try:
            self.listener(error)
        except Exception:  # what one request cannot hear is no matter of the others
            log.exception("the listener of request %s raised when it was told of its end", self.request.request_id)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output.

        Raises:
            EngineDead: the engine has stopped; RequestError: it refused the request after all.
        """
        if self._done:
            raise StopAsyncIteration
        while (output := self.tracker.take() if self.tracker else None) is None:
            if self._error is not None:
                self._done = True
                raise self._error
            self._has_news.clear()
            await self._has_news.wait()
        self._done = output.finished
        return output

    async def aclose(self) -> None:
        """Nobody listens any more."""
        if not self._done:
            self._done = True
            await self._engine.abort(self.request.request_id)


class AsyncEngine:
    """Made by ``await AsyncEngine.from_config(config)``; ended by ``await engine.shutdown()``.

    With a policy for restarts, an engine that died is started again; ``dead`` says why there is none until it is ready.
    Requests of which nothing has been given out begin again then, all others end. ``given_up`` is set where it stays
    dead.
    """

    facts: ModelFacts
    tokenizer: Tokenizer
    _outputs: OutputProcessor

    def __init__(self, config: EngineConfig, restart: RestartPolicy | None = None) -> None:
        self.config = config
        self.num_restarts = 0
        self.given_up = asyncio.Event()
        self._restarts = Restarts(restart or RestartPolicy(0))
        self._can_restart = restart is not None and restart.max_restarts > 0
        self.dead: EngineDead | None = None
        self._tracer = RequestTracer.of(config)
        self._streams: dict[str, RequestStream] = {}
        self._answers: dict[int, asyncio.Future[m.Answer]] = {}
        self._numbers = itertools.count()
        self._folder = Path(tempfile.mkdtemp(prefix="servekit-"))  # mode 0700
        self._context = zmq.asyncio.Context()
        self._launches = itertools.count()
        self._socket: zmq.asyncio.Socket = self._new_socket()
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._stopping = False

    def _new_socket(self) -> zmq.asyncio.Socket:
        made = self._context.socket(zmq.PAIR)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.SNDHWM, 0)
        made.setsockopt(zmq.RCVHWM, 0)
        return made

    @classmethod
    async def from_config(cls, config: EngineConfig, restart: RestartPolicy | None = None) -> AsyncEngine:
        """Start the engine's process and wait until its model is loaded and proven.

        Raises:
            ArtifactError, ConfigError: what the engine refused, as it was there.
            EngineDead: the process ended without a word.
        """
        engine = cls(config, restart)
        try:
            await engine._start()
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    async def _start(self) -> None:
        process = await self._spawn()
        try:  # while the process imports what it needs
            self.tokenizer = Tokenizer.from_folder(self.config.model)
        except BaseException:
            await self._kill()
            raise
        self._outputs = OutputProcessor(self.tokenizer, self._tracer)
        self.facts = (await self._loaded(process, self.config)).facts
        self.tokenizer.check_fits(self.facts.vocab_size)
        self._grammars = GrammarDoor(self.config.model, self.facts, self.config.grammar_limits)
        self._listening = asyncio.create_task(self._listen())
        self._supervising = asyncio.create_task(self._supervise())

    async def _launch(self, config: EngineConfig) -> m.Ready:
        """Start a process and wait until its model is loaded and proven."""
        return await self._loaded(await self._spawn(), config)

    async def _spawn(self) -> asyncio.subprocess.Process:
        address = f"ipc://{self._folder / f'engine-{next(self._launches)}'}"
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "servekit.engine.process", address, start_new_session=True
        )
        return self._process

    async def _loaded(self, process: asyncio.subprocess.Process, config: EngineConfig) -> m.Ready:
        first = await self._first_words(process, config)
        if isinstance(first, m.Failed):
            raise rebuilt(first.error)
        if not isinstance(first, m.Ready):
            raise EngineDead(message="the engine's process did not say that it is ready")
        return first

    async def _first_words(self, process: asyncio.subprocess.Process, config: EngineConfig) -> m.FromEngine:
        """Say what to load, and wait for the answer or for the process's end."""
        start = asyncio.ensure_future(self._socket.send(m.encode(m.Start(config))))  # once it has connected
        receive = asyncio.ensure_future(self._receive())
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({receive, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not receive.done():
                await asyncio.wait({receive}, timeout=1.0)  # its last words
            if not receive.done():
                status = process.returncode
                raise EngineDead(message=f"the engine's process ended with status {status} while loading")
            return receive.result()
        finally:
            for waiting in (start, receive, ended):
                waiting.cancel()

    async def _send(self, message: m.ToEngine) -> None:
        """Raises EngineDead where nobody takes the message: the process has gone and is not noticed yet."""
        try:
            async with asyncio.timeout(SEND_LIMIT_S):  # not wait_for: before 3.12 it may swallow a cancellation
                await self._socket.send(m.encode(message))
        except (TimeoutError, zmq.ZMQError) as error:
            raise self.dead or EngineDead(message="the engine's process takes no messages") from error

    async def _receive(self) -> m.FromEngine:
        return m.decode_from_engine(await self._socket.recv())

    # --- requests ---

    async def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int] | PromptEmbeds,
        params: SamplingParams,
        *,
        is_replayable: bool = False,
        listener: Listener | None = None,
        **about: Any,
    ) -> RequestStream:
        """Check a request and send it to the engine.

        Args:
            is_replayable: the caller can take its outputs from the start again, should the engine die in between.
            listener: is called with each output, or with the error that ends them, in place of the iteration: it must
                not raise, nor wait. It may return what is told mere text from then on, as ``RequestStream`` says.
            about: ``priority``, ``tenant``, ``cache_salt``, ``timeout_s``, ``add_special_tokens``, ``param``,
                ``pooling``: as ``validate`` takes them.

        Raises:
            RequestError: it cannot be served.
            EngineDead: nothing can.
        """
        self._raise_if_dead()
        request = validate(request_id, prompt, params, self.facts, self.tokenizer, **about)
        if params.structured_outputs is not None:
            await self._grammars.check_beside(params.structured_outputs)
            self._raise_if_dead()
        if request_id in self._streams:
            raise RequestError("request_id", request_id, "an id that is not in use", code="conflict")
        text = prompt if isinstance(prompt, str) else None
        stream = RequestStream(self, request, text, is_replayable=is_replayable, listener=listener)
        self._streams[request_id] = stream
        stream.tracker = self._outputs.add(request, stream.prompt)
        try:
            await self._send(m.Add(request))
        except EngineDead:
            self._streams.pop(request_id, None)
            self._outputs.forget(request_id)
            raise
        return stream

    async def generate(
        self,
        prompt: str | Sequence[int] | PromptEmbeds,
        sampling_params: SamplingParams,
        request_id: str,
        **about: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request as they come; leaving the loop early ends the request in the engine::

            async for output in engine.generate("Once upon", SamplingParams(max_tokens=99), "my-request"):
                if "end" in output.outputs[0].text:
                    break

        Args:
            about: as ``add_request`` takes it.

        Raises:
            RequestError: it cannot be served; EngineDead: nothing can.
        """
        stream = await self.add_request(request_id, prompt, sampling_params, **about)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def abort(self, request_id: str) -> None:
        """End a request, wherever it is; unknown ids are requests that have ended.

        Who reads its stream gets one last output, whose answers end with ``abort``.
        """
        stream = self._streams.pop(request_id, None)
        sequence_ids = self._outputs.forget(request_id)
        if stream is not None and stream.listener is None and stream.tracker is not None:
            stream.tracker.abort()
            stream.moved()
        if sequence_ids and self.dead is None:
            with contextlib.suppress(EngineDead):  # then there is nothing left to end
                await self._send(m.Abort(sequence_ids))

    async def stats(self) -> SchedulerStats:
        answer = await self._ask("stats")
        return answer.stats or SchedulerStats()

    async def reset_prefix_cache(self) -> bool:
        return (await self._ask("reset_prefix_cache")).done

    async def sleep(self, level: int) -> None:
        """Give memory back until ``wake_up``: the KV cache (level 1), and the weights as well (level 2).

        Raises:
            ResourceError: requests are under way.
        """
        await self._ask("sleep", level)

    async def wake_up(self) -> None:
        await self._ask("wake_up")

    async def _ask(self, what: str, level: int = 0) -> m.Answer:
        self._raise_if_dead()
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(m.Ask(number, what, level))
            async with asyncio.timeout(ASK_LIMIT_S):
                answer = await self._answers[number]
            if answer.error is not None:
                raise rebuilt(answer.error)
            return answer
        finally:
            del self._answers[number]

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def is_ready(self) -> bool:
        return self.dead is None and hasattr(self, "facts") and not self._stopping

    @property
    def has_process(self) -> bool:
        """Whether the process runs, asked of the system itself: its end is noticed some moments after it.

        A process that was killed has lost its command line while the system still takes its memory down.
        """
        if self._process is None:
            return False
        with contextlib.suppress(OSError):  # a system without /proc, or a process that is gone altogether
            if not Path(f"/proc/{self._process.pid}/cmdline").read_bytes():
                return False
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def _raise_if_dead(self) -> None:
        if self.dead is not None:
            raise self.dead

    # --- the engine's side ---

    async def _listen(self) -> None:
        """Take in what the engine says. Where that goes wrong the engine is ended and begun again."""
        try:
            await self._take_in()
        except Exception:
            log.exception("what the engine says cannot be taken in: its process is ended")
            if self._process is not None and self._process.returncode is None:
                self._process.kill()

    async def _take_in(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket.underlying)  # for what does not wait
        while True:
            messages = [await self._receive(), *_waiting(socket)]
            updates = [update for message in messages if isinstance(message, m.News) for update in message.updates]
            moved, ended = self._outputs.process(updates)
            for tracker in moved:
                ended += self._pass_on(tracker)
            if ended:
                with contextlib.suppress(EngineDead):
                    await self._send(m.Abort(ended))
            for message in messages:
                self._heed(message)
            await asyncio.sleep(0)  # a message that is there already is received without a turn for others

    def _heed(self, message: m.FromEngine) -> None:
        match message:
            case m.News():
                pass  # taken in already, with that of other steps
            case m.Refused(request_id, error):
                self._outputs.forget(request_id)
                stream = self._streams.pop(request_id, None)
                if stream:
                    stream.fail(rebuilt(error))
            case m.Answer(number):
                future = self._answers.get(number)
                if future and not future.done():
                    future.set_result(message)
            case _:
                raise EngineDead(message=f"the engine said {type(message).__name__} out of turn")

    def _pass_on(self, tracker: RequestTracker) -> Sequence[str]:
        """Tell a request's reader; the ids of its sequences where the reader raised: it ends then, alone."""
        request_id = tracker.request.request_id
        stream = self._streams.get(request_id)
        if stream is None:
            return ()
        if tracker.finished:
            del self._streams[request_id]
        try:
            stream.moved()
        except Exception:
            log.exception("the listener of request %s raised; the request ends", request_id)
            self._streams.pop(request_id, None)
            stream.fail(PlatformError(message=f"internal error, id {request_id}", code="internal_error"))
            return self._outputs.forget(request_id)
        return ()

    async def _supervise(self) -> None:
        """The moment the process ends, everybody who waits for it learns so; then it is started again."""
        while self._process is not None:
            status = await self._process.wait()
            if self._stopping:
                return
            await self._died(status)
            if not await self._revived():
                self._end_streams(list(self._streams))
                self.given_up.set()
                return

    async def _died(self, status: int) -> None:
        self.dead = EngineDead(message=f"the engine has stopped (status {status}); requests in flight are lost")
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        lost = [key for key, stream in self._streams.items() if not (self._can_restart and stream.may_begin_again)]
        self._end_streams(lost)
        self._outputs.clear()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(self.dead)

    def _end_streams(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id).fail(self.dead or EngineDead())

    async def _revived(self) -> bool:
        """Start the engine again, as often as the policy allows; False where it stays dead."""
        config = msgspec.structs.replace(self.config, max_model_len=self.facts.max_model_len)  # as was promised
        while (delay_s := self._restarts.next_delay_s()) is not None:
            await asyncio.sleep(delay_s)
            self._socket.close(linger=0)
            self._socket = self._new_socket()
            try:
                await self._launch(config)
            except Exception as error:  # nobody else would start it
                is_ours = isinstance(error, PlatformError)
                log.error("the engine could not be started again: %s", error, exc_info=not is_ours)
                await self._kill()
                continue
            await self._resume()
            return True
        return False

    async def _resume(self) -> None:
        """Requests that were kept begin again."""
        self.num_restarts += 1
        self._listening = asyncio.create_task(self._listen())
        self.dead = None
        log.warning("the engine was started again; %d requests begin again", len(self._streams))
        for stream in list(self._streams.values()):
            stream.tracker = self._outputs.add(stream.request, stream.prompt)
            with contextlib.suppress(EngineDead):  # it died again, which is noticed elsewhere
                await self._send(m.Add(stream.request))

    async def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def shutdown(self, *, limit_s: float = STOP_LIMIT_S) -> None:
        """End the process and leave nothing behind. Requests still in flight get EngineDead.

        Args:
            limit_s: what the process has to end by itself.
        """
        self._stopping = True
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        dead = self.dead = self.dead or EngineDead(message="the engine was shut down")
        for stream in self._streams.values():
            stream.fail(dead)
        self._streams.clear()
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(EngineDead):
                await self._send(m.Stop())
            try:
                async with asyncio.timeout(limit_s):
                    await process.wait()
            except TimeoutError:
                await self._kill()
        if hasattr(self, "_grammars"):
            self._grammars.close()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
