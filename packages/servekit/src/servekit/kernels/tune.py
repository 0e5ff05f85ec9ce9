"""Measure how each kernel is best launched on the device at hand, and write that down for ``servekit.kernels.tuning``.

Only parts of a launch that leave the result alone are tried, so a tuned server answers as an untuned one does.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from servekit.kernels import tuning
from servekit.kernels.paged_attention.metadata import paged_metadata

Timer = Callable[[Callable[[], Any]], float]  # seconds of a call
BLOCK_SIZE = 16
REPEATS = 10
WORTH = 0.97  # of the default's time that another configuration must stay below to be written down


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is tried for one kernel: all combinations of ``choices``, on a batch as large as serving makes it."""

    kernel: str
    choices: dict[str, tuple[int, ...]]
    rows: int
    context: int  # tokens before the new ones
    count: int  # new tokens a row

    def candidates(self) -> Iterator[dict[str, int]]:
        for values in itertools.product(*self.choices.values()):
            yield dict(zip(self.choices, values, strict=True))


LAUNCHES = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}
SPACES = (
    Space(
        kernel="paged_attention_decode",
        choices={"block_n": (32, 64, 128)} | LAUNCHES,
        rows=64,
        context=4095,
        count=1,
    ),
    Space(
        kernel="paged_attention_prefill",
        choices={"block_n": (32, 64, 128)} | LAUNCHES,
        rows=2,
        context=0,
        count=4096,
    ),
)


@dataclass(frozen=True, slots=True)
class Found:
    """The best of one space, its time and the default's, in seconds; how many did not run on this device."""

    kernel: str
    shape: dict[str, int]
    config: dict[str, int]
    best_s: float
    default_s: float
    num_failed: int


def tune(
    space: Space,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
) -> Found:
    """Time every candidate; one that the device cannot launch is passed over."""
    from servekit.kernels.paged_attention.triton_backend import paged_attention

    per_row = -(-(space.context + space.count) // BLOCK_SIZE)
    cache = torch.randn(2, space.rows * per_row + 1, BLOCK_SIZE, kv_heads, head_dim, device=device, dtype=dtype)
    order = np.random.default_rng(0).permutation(space.rows * per_row).astype(np.int32) + 1
    starts, counts = np.full(space.rows, space.context), np.full(space.rows, space.count)
    metadata = paged_metadata(order.reshape(space.rows, per_row), starts, counts, BLOCK_SIZE, 0, device)
    query = torch.randn(space.rows * space.count, heads, head_dim, device=device, dtype=dtype)

    def call() -> None:
        paged_attention(query, cache, metadata, head_dim**-0.5)

    default_s = timer(call)
    best: dict[str, int] = {}
    best_s, num_failed = default_s * WORTH, 0
    for candidate in space.candidates():
        with tuning.trying(space.kernel, candidate):
            try:
                seconds = timer(call)
            except Exception as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                num_failed += 1
                continue
        if seconds < best_s:
            best, best_s = candidate, seconds
    shape = {"head_dim": head_dim, "groups": heads // kv_heads}
    return Found(space.kernel, shape, best, best_s if best else default_s, default_s, num_failed)


def device_seconds(call: Callable[[], Any]) -> float:
    """The median of some calls on a CUDA or ROCm device, after two to compile and to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def entries(found: list[Found]) -> dict[str, list[dict[str, Any]]]:
    """What ``tuning.write`` writes of those that beat their default."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one.config:
            kept.setdefault(one.kernel, []).append({"shape": one.shape, "config": one.config})
    return kept
