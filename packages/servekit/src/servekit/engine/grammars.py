"""Structured output in the engine: constraints are judged at the door, and compiled beside the step loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from common_platform.errors import RequestError, ResourceError
from servekit.core.facts import ModelFacts
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.grammar import engine as library
from servekit.sampling.structured.guard import GrammarGuard
from servekit.sampling.structured.limits import GrammarLimits

if TYPE_CHECKING:  # a server, which only asks at the door, has its engine start sooner without
    from servekit.sampling.structured.matcher import GrammarCompiler, GrammarState


class GrammarDoor:
    """Says of a constraint whether it can be followed, by a child process that a deadline can kill.

    Args:
        folder: the model's.
    """

    def __init__(self, folder: str | Path, facts: ModelFacts, limits: GrammarLimits) -> None:
        self._folder = Path(folder)
        self._facts = facts
        self._limits = limits
        self._guard: GrammarGuard | None = None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="servekit-grammar-door")

    def knows(self, spec: StructuredOutput) -> bool:
        """Whether ``check`` found ``spec`` good, and would say so at once."""
        return self._guard is not None and self._guard.knows(spec)

    async def check_beside(self, spec: StructuredOutput) -> None:
        """As ``check``, for an event loop; cancelled, it ends the compile. Constraints take turns.

        Raises:
            RequestError: as ``check`` does.
        """
        if self.knows(spec):
            return
        gone = threading.Event()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.check, spec, gone)
        finally:
            gone.set()

    def check(self, spec: StructuredOutput, gone: threading.Event | None = None) -> None:
        """Return where ``spec`` can be followed. Blocks up to the deadline: not for an event loop.

        Args:
            gone: set when nobody waits any more.

        Raises:
            RequestError: code ``grammar_*``, or ``unsupported`` where llguidance is not installed.
            Abandoned: ``gone`` was set.
        """
        try:
            library()
        except ResourceError as error:
            wanted = "a server with structured output: pip install 'servekit[grammar]'"
            raise RequestError("structured_outputs", "a grammar", wanted, code="unsupported") from error
        with self._lock:
            if self._guard is None:
                ids = self._facts.eos_token_ids
                self._guard = GrammarGuard.for_folder(self._folder, self._facts.vocab_size, ids, self._limits)
        self._guard.check(spec, gone)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._guard is not None:
                self._guard.close()


class Grammars:
    """Compiles constraints in a thread while their requests are held, and makes states for the sampler.

    Args:
        folder: the model's.
    """

    def __init__(self, folder: str | Path, facts: ModelFacts, limits: GrammarLimits) -> None:
        self._folder = Path(folder)
        self._facts = facts
        self._limits = limits
        self._compiler: GrammarCompiler | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="servekit-grammars")
        self._under_way: dict[Future[GrammarState], list[str]] = {}

    def prepare(self, spec: StructuredOutput, sequence_ids: Sequence[str]) -> None:
        """Begin to compile ``spec`` for held sequences; ``finished`` will name them."""
        self._under_way[self._thread.submit(self.start, spec)] = list(sequence_ids)

    def start(self, spec: StructuredOutput) -> GrammarState:
        """A state at the beginning of ``spec``; cheap once it was prepared."""
        if self._compiler is None:
            from servekit.sampling.structured.matcher import GrammarCompiler

            text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
            self._compiler = GrammarCompiler(text, self._facts.vocab_size, self._facts.eos_token_ids, self._limits)
        return self._compiler.compile(spec)

    def leave(self, sequence_ids: Collection[str]) -> None:
        """Nobody waits for these any more: what is not begun for others is not begun."""
        for future, waiting in list(self._under_way.items()):
            waiting[:] = [sequence_id for sequence_id in waiting if sequence_id not in sequence_ids]
            if not waiting and future.cancel():
                del self._under_way[future]

    def finished(self, wait_s: float = 0.0) -> list[tuple[list[str], str | None]]:
        """The sequences whose constraint is there, or with the reason why it is not."""
        if not self._under_way:
            return []
        done = wait(self._under_way, wait_s, FIRST_COMPLETED).done
        return [(self._under_way.pop(future), _reason(future)) for future in done]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _reason(future: Future[GrammarState]) -> str | None:
    error = future.exception()
    if error is None:
        return None
    return str(error) if isinstance(error, RequestError) else f"{type(error).__name__} while compiling the grammar"
