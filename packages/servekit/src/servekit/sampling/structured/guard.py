"""The door for constraints: each is compiled once in a child process that a deadline can kill."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from select import select
from typing import IO

import msgspec

from common_platform.errors import RequestError, ResourceError
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.grammar import field_of
from servekit.sampling.structured.limits import GrammarLimits, check_limits

MAX_REMEMBERED = 4096  # digests of constraints that were found good
START_TIMEOUT_S = 60.0
LOOK_S = 0.05  # how often it is asked whether the caller has gone
FAREWELL_S = 0.25  # what a compile may still take then: to start another child costs more


class Abandoned(Exception):
    """Nobody waits for the verdict any more."""


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """What the child must know before it can compile."""

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: list[int]
    limits: dict[str, float]


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """The child's answer; an empty code means that the constraint is good."""

    code: str = ""
    message: str = ""
    param: str | None = None


class GrammarGuard:
    """Says whether a constraint can be followed, without ever working on it in this process.

    One child serves one constraint at a time and lives on; at a deadline it is killed and the next call starts
    another. Safe to call from several threads; they take turns.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int], limits: GrammarLimits | None = None
    ) -> None:
        self._limits = limits or GrammarLimits()
        settings = {name: getattr(self._limits, name) for name in self._limits.__slots__}
        self._setup = msgspec.msgpack.encode(Setup(tokenizer_json, vocab_size, list(eos_token_ids), settings))
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._closed = False

    @classmethod
    def for_folder(
        cls, folder: Path, vocab_size: int, eos_token_ids: Sequence[int], limits: GrammarLimits | None = None
    ) -> GrammarGuard:
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), vocab_size, eos_token_ids, limits)

    def knows(self, spec: StructuredOutput) -> bool:
        """Whether ``spec`` was found good before, and is remembered; never waits."""
        return hashlib.sha256(msgspec.msgpack.encode(spec)).digest() in self._good

    def check(self, spec: StructuredOutput, gone: threading.Event | None = None) -> None:
        """Return where ``spec`` can be followed.

        Args:
            gone: set when nobody waits any more: the child at work on it is killed.

        Raises:
            RequestError: code ``grammar_*``; ``param`` starts with the spec's field.
            ResourceError: the child cannot be started.
            Abandoned: ``gone`` was set.
        """
        check_limits(spec, self._limits)
        packed = msgspec.msgpack.encode(spec)
        key = hashlib.sha256(packed).digest()
        with self._turn:
            if key in self._good:
                self._good.move_to_end(key)
                return
            if gone is not None and gone.is_set():
                raise Abandoned
            verdict = self._ask(packed, spec, gone)
            if verdict.code:
                raise RequestError(verdict.param, code=verdict.code, message=verdict.message)
            self._good[key] = None
            if len(self._good) > MAX_REMEMBERED:
                self._good.popitem(last=False)

    def close(self) -> None:
        """End the child; later checks are refused."""
        with self._turn:
            self._closed = True
            self._kill()

    def _ask(self, packed: bytes, spec: StructuredOutput, gone: threading.Event | None) -> Verdict:
        child = self._started()
        try:
            _send(child, packed)
            answer = _receive(child, self._limits.timeout_s, gone)
        except OSError:
            answer = b""
        except Abandoned:
            self._kill()
            raise
        if answer is None:
            self._kill()
            raise RequestError(
                field_of(spec),
                "a constraint that takes too long to compile",
                f"{self._limits.timeout_s:g} s",
                code="grammar_timeout",
                flag="--grammar-timeout-s",
            )
        if not answer:  # the child is gone: the system ended it at its memory limit
            self._kill()
            raise RequestError(
                field_of(spec),
                "a constraint that needs too much memory",
                code="grammar_too_large",
                flag="--max-grammar-states",
            )
        return msgspec.msgpack.decode(answer, type=Verdict)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise ResourceError("structured_outputs", "closed", "an open server", code="closed")
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._kill()
        command = [sys.executable, "-P", "-m", "servekit.sampling.structured.child"]
        child = self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            _send(child, self._setup)
            ready = _receive(child, START_TIMEOUT_S)
        except OSError:
            ready = None
        if not ready:
            self._kill()
            raise ResourceError("structured_outputs", "the compiling process did not start", code="child_failed")
        verdict = msgspec.msgpack.decode(ready, type=Verdict)
        if verdict.code:
            raise ResourceError("structured_outputs", code=verdict.code, message=verdict.message)
        return child

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was still to be written has no reader any more
                    continue


def _send(child: subprocess.Popen[bytes], body: bytes) -> None:
    if child.stdin is None:
        raise BrokenPipeError
    child.stdin.write(struct.pack("<I", len(body)) + body)
    child.stdin.flush()


def _receive(child: subprocess.Popen[bytes], timeout_s: float, gone: threading.Event | None = None) -> bytes | None:
    """One message; None at the deadline, empty where the child has gone.

    Raises:
        Abandoned: ``gone`` was set, and no message came soon after.
    """
    if child.stdout is None or not _has_come(child.stdout, timeout_s, gone):
        return None
    head = child.stdout.read(4)
    return child.stdout.read(struct.unpack("<I", head)[0]) if len(head) == 4 else b""


def _has_come(pipe: IO[bytes], timeout_s: float, gone: threading.Event | None) -> bool:
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        if select([pipe], [], [], left_s if gone is None else min(left_s, LOOK_S))[0]:
            return True
        if gone is not None and gone.is_set() and not select([pipe], [], [], min(left_s, FAREWELL_S))[0]:
            raise Abandoned
    return False
