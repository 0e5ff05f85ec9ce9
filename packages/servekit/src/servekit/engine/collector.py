"""Python's cyclic garbage collector, out of the way of the step loop and of the server's.

A step makes a few short-lived objects a row and no cycles; with the default thresholds the collector looks through
them, and ever again through the whole process, many times a second.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

YOUNG, OLDER, OLD = 50_000, 50, 100
NEVER = 1 << 30


@contextmanager
def fewer_collections(young: int = YOUNG) -> Generator[None, None, None]:
    """While steps run; the caller's thresholds come back afterwards.

    Args:
        young: new objects that are looked through at once, which takes some 2 us each: nothing else runs meanwhile.
    """
    before = gc.get_threshold()
    gc.set_threshold(young, OLDER, OLD)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def short_collections() -> Generator[None, None, None]:
    """For what measures others, whose own pauses would be counted as theirs: only what is new is looked through."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], NEVER, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
