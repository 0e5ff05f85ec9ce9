"""The engine's own process: ``python -m servekit.engine.process ipc://ADDRESS``, started by the client."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import zmq

from common_platform.errors import Overloaded, PlatformError, RequestError
from servekit.engine import messages as m
from servekit.engine.collector import fewer_collections
from servekit.engine.engine import EngineCore

IDLE_MS = 1000  # how often an idle engine looks whether its parent is alive
PR_SET_PDEATHSIG = 1


class EngineProcess:
    """Takes messages between steps; never waits for a slow reader."""

    def __init__(self, address: str) -> None:
        self._parent = os.getppid()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)
        self._stopping = False

    def _send(self, message: Any) -> None:
        self._socket.send(m.encode(message))

    def _receive(self, timeout_ms: int) -> Any:
        if not self._socket.poll(timeout_ms):
            return None
        return m.decode_to_engine(self._socket.recv())

    def run(self) -> int:
        """The process's exit status."""
        start = self._receive(60_000)
        if not isinstance(start, m.Start):
            return 1
        try:
            core = EngineCore(start.config)
        except PlatformError as error:
            self._send(m.Failed(error.to_dict()))
            return 0
        except Exception as error:
            traceback.print_exc()
            self._send(m.Failed(PlatformError(None, f"{type(error).__name__} while loading the model").to_dict()))
            raise
        self._send(m.Ready(core.facts, core.cache.num_blocks, core.cache.block_size))
        gc.collect()
        gc.freeze()  # the model and the modules are here to stay
        try:
            with fewer_collections():
                self._serve(core)
        finally:
            core.stop()
            self._socket.close()
        return 0

    def _serve(self, core: EngineCore) -> None:
        while not self._stopping and os.getppid() == self._parent:
            self._take_messages(core, 0 if core.has_work else self._idle_ms(core))
            updates = core.step()
            if updates:
                self._send(m.News(updates))

    def _idle_ms(self, core: EngineCore) -> int:
        deadline = core.scheduler.next_deadline
        return IDLE_MS if deadline is None else max(0, min(IDLE_MS, int((deadline - time.monotonic()) * 1000)))

    def _take_messages(self, core: EngineCore, timeout_ms: int) -> None:
        message = self._receive(timeout_ms)
        while message is not None:
            self._obey(core, message)
            message = self._receive(0)

    def _obey(self, core: EngineCore, message: Any) -> None:
        match message:
            case m.Add(request):
                try:
                    _raise_if_asleep(core)
                    core.add(request)
                except (RequestError, Overloaded) as error:
                    self._send(m.Refused(request.request_id, error.to_dict()))
            case m.Abort(sequence_ids):
                core.abort(sequence_ids)
            case m.Ask(number, "stats"):
                self._send(m.Answer(number, core.stats()))
            case m.Ask(number, "reset_prefix_cache"):
                self._send(m.Answer(number, done=core.reset_prefix_cache()))
            case m.Ask(number, "sleep", level):
                self._send(m.Answer(number, error=_fault_of(lambda: core.sleep(level))))
            case m.Ask(number, "wake_up"):
                self._send(m.Answer(number, error=_fault_of(core.wake_up)))
            case m.Stop():
                self._stopping = True


def _raise_if_asleep(core: EngineCore) -> None:
    if core.is_sleeping:
        raise Overloaded(code="sleeping", message="the engine sleeps")


def _fault_of(work: Callable[[], None]) -> dict[str, Any] | None:
    """What went wrong in ``work``, as it crosses to the client."""
    try:
        work()
    except PlatformError as error:
        return error.to_dict()
    return None


def die_with_parent() -> None:
    """On Linux the kernel ends this process when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    return EngineProcess(sys.argv[1]).run()


if __name__ == "__main__":
    sys.exit(main())
