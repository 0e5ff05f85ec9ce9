"""Signals in training: go on to the next quiet moment, and do there what was asked for.

SIGTERM: save a checkpoint and exit with status 143. SIGUSR1: save one and go on; in a job of SLURM, which sends it
before its time is over, put the job back into the queue and exit.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM
HEEDED = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


@contextmanager
def heeding(heard: Callable[[int], None]) -> Iterator[None]:
    """In the block, the signals above call ``heard`` with their number and nothing else; a second SIGTERM ends the
    process as usual.

    Outside of the main thread, where Python cannot handle signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
        heard(number)

    before = {number: signal.getsignal(number) for number in HEEDED}
    for number in HEEDED:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
