"""Python's cyclic garbage collector, out of the way of the step loop and of the server's.

A step makes a few short-lived objects a row and no cycles; with the default thresholds the collector looks through
them, and ever again through the whole process, many times a second.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

THRESHOLDS = (50_000, 50, 100)


@contextmanager
def fewer_collections() -> Generator[None, None, None]:
    """While steps run; the caller's thresholds come back afterwards."""
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
