"""Kernels that are compiled while somebody waits: after a server has warmed up there should be none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What Triton compiles meanwhile in this process, on any thread: names with the types they were compiled for.

    A kernel that is found in Triton's cache on the disk counts as well, for it is loaded then. Interpreted kernels are
    never compiled, and never counted.
    """
    from triton import knobs

    found: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def hook(**told: Any) -> Any:
        found.append(f"{told['fn'].module}.{told['repr']}")
        return before(**told) if before else None

    knobs.runtime.jit_post_compile_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before
