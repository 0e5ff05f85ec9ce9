"""Measure how each kernel is best launched on the device at hand, and write that down for ``servekit.kernels.tuning``.

Only the cut into programs and their schedule are tried, never what is computed: a tuned server's answers differ from an
untuned one's by the rounding of sums at the most.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from servekit.kernels import tuning

Timer = Callable[[Callable[[], Any]], float]  # seconds of a call
REPEATS = 10
WORTH = 0.97  # of the default's time that another configuration must stay below to be written down
LAUNCHES = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is tried for one kernel and shape: all combinations of ``choices``.

    ``shape``: as the kernel's launcher looks it up. ``make``: allocates a batch as serving makes it, and returns the
    call to time. ``make_other``: the same by FlashInfer, where it has such a kernel.
    """

    kernel: str
    shape: dict[str, int]
    choices: dict[str, tuple[int, ...]]
    make: Callable[[], Callable[[], Any]]
    make_other: Callable[[], Callable[[], Any]] | None = None

    def candidates(self) -> Iterator[dict[str, int]]:
        for values in itertools.product(*self.choices.values()):
            yield dict(zip(self.choices, values, strict=True))


@dataclass(frozen=True, slots=True)
class Found:
    """The best of one space, its time and the default's, in seconds; how many did not run on this device."""

    kernel: str
    shape: dict[str, int]
    config: dict[str, int]
    best_s: float
    default_s: float
    num_failed: int


def tune(space: Space, timer: Timer) -> Found:
    """Time every candidate; one that the device cannot launch is passed over."""
    call = space.make()
    with tuning.trying(space.kernel, space.shape, {}):
        default_s = timer(call)
    best: dict[str, int] = {}
    best_s, num_failed = default_s * WORTH, 0
    for candidate in space.candidates():
        with tuning.trying(space.kernel, space.shape, candidate):
            try:
                seconds = timer(call)
            except Exception:  # noqa: BLE001 - too much shared memory, a shape that the compiler refuses: counted
                num_failed += 1
                continue
        if seconds < best_s:
            best, best_s = candidate, seconds
    return Found(space.kernel, space.shape, best, best_s if best else default_s, default_s, num_failed)


def device_seconds(call: Callable[[], Any]) -> float:
    """The median of some calls on a GPU, after two to compile and to warm up."""
    device: Any = torch.cuda if torch.cuda.is_available() else torch.xpu
    for _ in range(2):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = (device.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def entries(found: Iterable[Found]) -> dict[str, list[dict[str, Any]]]:
    """What ``tuning.write`` writes of those that beat their default."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one.config:
            kept.setdefault(one.kernel, []).append({"shape": one.shape, "config": one.config})
    return kept
