"""What a machine could do: bytes read and operations a second, measured with the kernels' own instructions.

The bound of a step is the larger of bytes / bandwidth and operations / peak. The bandwidth is that of reading memory
larger than the caches; the peak is of multiplications of numbers that stay in registers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from servekit.kernels.native import Format, Pool, native_library

BYTES = {"fp32": 4.0, "bf16": 2.0, "8-bit": 1.0, "4-bit": 0.625}  # of a layer's weight
HEAD_BYTES = BYTES | {"4-bit": 1.0}  # of the vocabulary's: its errors are seen in every logit
FORMATS = {"fp32": Format.F32, "bf16": Format.BF16, "8-bit": Format.I8, "4-bit": Format.I4}
READ_BYTES = 1 << 29


@dataclass(frozen=True)
class Shape:
    """What a token costs: weights that it is multiplied with, and numbers of each earlier token that it meets."""

    layer_weights: int
    head_weights: int  # only for tokens that are answered
    kv_numbers: int  # of a token, keys and values of all layers
    query_numbers: int  # of a token, all layers

    def attention(self, keys: float) -> float:
        """Operations of one token that looks at ``keys`` tokens."""
        return 4.0 * self.query_numbers * keys


SMOLLM2_135M = Shape(106_168_320, 28_311_552, 2 * 3 * 64 * 30, 9 * 64 * 30)


@dataclass(frozen=True)
class Bounds:
    """``read`` in bytes a second, ``peak`` of each width of weights in operations a second."""

    read: float
    peak: dict[str, float]

    def figures(self) -> dict[str, float]:
        return {"read bandwidth, GB/s": self.read / 1e9} | {
            f"peak of {family}, GFLOP/s": peak / 1e9 for family, peak in self.peak.items()
        }

    def tokens_per_second(self, family: str, workload: Any, shape: Shape) -> float:
        """Of a workload whose requests run together: a step reads all weights and what it looks at of the cache."""
        kv = "fp32" if family == "fp32" else "bf16"
        prompts = [len(prompt) - workload.shared for prompt in workload.prompts]
        prompts[0] += workload.shared
        seen = sum(n * (len(p) - n / 2) for n, p in zip(prompts, workload.prompts, strict=True))
        weights = shape.layer_weights * BYTES[family] + shape.head_weights * HEAD_BYTES[family]
        linear = 2.0 * (shape.layer_weights * sum(prompts) + shape.head_weights * len(prompts)) / self.peak[family]
        seconds = max(weights / self.read, linear + shape.attention(seen) / self.peak[kv])
        for step in range(1, max(workload.outputs)):
            keys = [len(p) + step for p, n in zip(workload.prompts, workload.outputs, strict=True) if n > step]
            read = weights + shape.kv_numbers * sum(keys) * BYTES[kv]
            linear = 2.0 * len(keys) * (shape.layer_weights + shape.head_weights) / self.peak[family]
            seconds += max(read / self.read, linear + shape.attention(sum(keys)) / self.peak[kv])
        return float(workload.tokens / seconds)


def measure_bounds(threads: int) -> Bounds:
    library = native_library()
    if library is None:
        raise SystemExit("the CPU kernels were not built: there is nothing to measure")
    pool = Pool(library, threads)
    return Bounds(_read(threads), {family: _peak(library, pool, format) for family, format in FORMATS.items()})


def _best(work: Any, rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _read(threads: int) -> float:
    """By torch's sum over more than any cache holds, which every thread reads a part of."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    numbers = torch.from_numpy(np.ones(READ_BYTES // 4, np.float32))
    taken = _best(lambda: numbers.sum(), 7)
    torch.set_num_threads(before)
    return READ_BYTES / taken


def _peak(library: Any, pool: Pool, format: Format) -> float:
    """Of the instructions that products with such weights are made of, on numbers that stay in registers."""
    rounds = 1 << 12
    done: list[float] = []
    taken = _best(lambda: done.append(library.c.sk_peak(pool.handle, format, rounds)), 15)
    return done[0] / taken
