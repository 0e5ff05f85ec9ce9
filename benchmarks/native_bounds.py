"""What a machine could do: bytes read and operations a second, measured with the kernels' own instructions.

The bound of a step is the larger of bytes / bandwidth and operations / peak. The bandwidth is that of reading memory
larger than the caches; the peak is of multiplications of numbers that stay in registers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servekit.kernels.native import Format, Pool, native_library
from servekit.kernels.native.memory import HUGE_PAGE, aligned

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
    """``read`` in bytes a second, ``peak`` of each width of weights in operations a second.

    ``alone``: the peaks of one thread. ``huge``: the share of what was read that the system maps by pages of 2 MiB.
    """

    read: float
    peak: dict[str, float]
    alone: dict[str, float]
    huge: float

    def figures(self) -> dict[str, float]:
        found = {"read bandwidth, GB/s": self.read / 1e9, "of that by huge pages": self.huge}
        for family, peak in self.peak.items():
            found[f"peak of {family}, GFLOP/s"] = peak / 1e9
            found[f"peak of {family} of one thread, GFLOP/s"] = self.alone[family] / 1e9
        return found

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
            seconds += self.decode_step(family, len(keys), sum(keys), shape)
        return float(workload.tokens / seconds)

    def decode_step(self, family: str, rows: int, keys: int, shape: Shape) -> float:
        """Seconds of a step of one token a row, which look at ``keys`` tokens in all."""
        kv = "fp32" if family == "fp32" else "bf16"
        weights = shape.layer_weights * BYTES[family] + shape.head_weights * HEAD_BYTES[family]
        read = weights + shape.kv_numbers * keys * BYTES[kv]
        linear = 2.0 * rows * (shape.layer_weights + shape.head_weights) / self.peak[family]
        return max(read / self.read, linear + shape.attention(keys) / self.peak[kv])


def measure_bounds(threads: int) -> Bounds:
    library = native_library()
    if library is None:
        raise SystemExit("the CPU kernels were not built: there is nothing to measure")
    pool, one = Pool(library, threads), Pool(library, 1)
    peaks = [{family: _peak(library, p, format) for family, format in FORMATS.items()} for p in (pool, one)]
    read, huge = _read(library, pool)
    return Bounds(read, *peaks, huge)


def _best(work: Any, rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _read(library: Any, pool: Pool) -> tuple[float, float]:
    """Bytes a second of more than any cache holds, in memory like that of the weights, and how much of it is huge."""
    before = _huge_bytes()
    numbers = aligned(READ_BYTES, HUGE_PAGE)
    numbers.fill(1)
    huge = (_huge_bytes() - before) / READ_BYTES
    taken = _best(lambda: library.c.sk_read(pool.handle, numbers.ctypes.data, READ_BYTES), 7)
    return READ_BYTES / taken, huge


def _huge_bytes() -> int:
    """Of this process, in huge pages."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


def _peak(library: Any, pool: Pool, format: Format) -> float:
    """Of the instructions that products with such weights are made of, on numbers that stay in registers."""
    rounds = 1 << 12
    done: list[float] = []
    taken = _best(lambda: done.append(library.c.sk_peak(pool.handle, format, rounds)), 15)
    return done[0] / taken
