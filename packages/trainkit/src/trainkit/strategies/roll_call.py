"""Who of the ranks is there: a lost one is called by its name.

A collective that fails says little: a connection was closed, or time is over. So each rank gives a sign of life in the
job's store twice a second, with the number of operations that it has come to, and says there why it ends. Who has lost
a rank looks there for its name.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

BEAT_S = 0.5
SILENT_S = 3.0  # without a sign of life, while others give theirs
ANSWER_S = 2.0  # the store is on this machine or in its network
MOST_WORDS = 200
ENDED = "ended by"


class RollCall:
    """One rank's side.

    Args:
        connect: makes a connection to the store that no one else uses, since one who waits holds it.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, world_size: int) -> None:
        self._connect = connect
        self._rank, self._world_size = rank, world_size
        self._done = 0  # operations that this rank has come to
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="roll-call")

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """No more signs of life. Called while Python still runs: the thread needs it to end."""
        self._over.set()
        self._thread.join(2 * BEAT_S)

    def advance(self) -> None:
        """This rank has come to its next operation."""
        self._done += 1

    def _beat(self) -> None:
        try:
            store = self._connect()
            while not self._over.wait(BEAT_S):
                self._beats += 1
                store.set(f"beat/{self._rank}", f"{self._beats} {self._done}")
        except RuntimeError:  # who keeps the store is gone, which is seen and said elsewhere
            return

    def report(self, error: BaseException) -> None:
        """Say why this rank ends, for those that will miss it."""
        words = f"{type(error).__name__}: {error}"[:MOST_WORDS]
        _answered(lambda: self._write(words))

    def _write(self, words: str) -> str | None:
        store = self._connect()
        number = store.add("failures", 1)
        store.set(f"failure/{number}", json.dumps([self._rank, words]))
        return None

    def missing(self) -> str:
        """Which rank is the cause when an operation failed, as far as it can be known."""
        found = _answered(self._look)
        return found or "rank 0, or who keeps the job's store, does not answer"

    def _look(self) -> str:
        store = self._connect()
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        first = {rank: _signs(store, rank) for rank in others}
        silent, deadline = set(others), time.monotonic() + SILENT_S
        while silent and time.monotonic() < deadline:
            reported = self._reported(store)
            if reported:
                return reported
            time.sleep(BEAT_S / 5)
            silent = {rank for rank in silent if _signs(store, rank)[0] == first[rank][0]}
        if silent:
            return f"{_ranks(silent)}: no sign of life"
        done = {rank: _signs(store, rank)[1] for rank in others} | {self._rank: self._done}
        behind = {rank for rank in others if done[rank] < self._done}
        if behind:
            return f"{_ranks(behind)}: alive, at operation {min(done.values())}, others at {max(done.values())}"
        return "no rank is missing: the connection between them failed"

    def _reported(self, store: Any) -> str | None:
        """The first of the other ranks that said why it ends."""
        for number in range(1, self._world_size + 1):
            if not store.check([f"failure/{number}"]):
                return None
            rank, words = json.loads(store.get(f"failure/{number}"))
            if rank != self._rank:
                return f"rank {rank} {ENDED} {words}"
        return None


def _signs(store: Any, rank: int) -> tuple[int, int]:
    """How often ``rank`` gave a sign of life, and how far it had come."""
    if not store.check([f"beat/{rank}"]):
        return 0, 0
    beats, done = store.get(f"beat/{rank}").split()
    return int(beats), int(done)


def _ranks(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _answered(ask: Callable[[], str | None]) -> str | None:
    """What ``ask`` finds; None where the store does not answer: a process that is stopped keeps its callers waiting."""
    found: list[str | None] = []

    def run() -> None:
        try:
            found.append(ask())
        except RuntimeError:  # it is gone
            return

    thread = threading.Thread(target=run, daemon=True, name="roll-call-question")
    thread.start()
    thread.join(SILENT_S + ANSWER_S)
    return found[0] if found else None


def store_of_job(rank: int, world_size: int, timeout: timedelta, *, keeps: bool) -> Any:
    """A connection to the store at MASTER_ADDR and MASTER_PORT, where this attempt of the job has names of its own.

    Args:
        keeps: whether the store is this process's own to keep.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world_size, keeps, timeout, wait_for_workers=False, multi_tenant=True)
    return PrefixStore(f"trainkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
