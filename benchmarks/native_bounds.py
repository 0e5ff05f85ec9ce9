"""What a machine could do: bytes read and operations a second, measured with the kernels' own instructions.

The bound of a step is the larger of bytes / bandwidth and operations / peak. The bandwidth is that of reading memory
larger than the caches; the peak is a product small enough to stay in the nearest cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from servekit.kernels.native import Format, Pool, Program, Rows, native_library, pack

BYTES = {"fp32": 4.0, "bf16": 2.0, "8-bit": 1.0, "4-bit": 0.625}  # of a weight
FORMATS = {"fp32": Format.F32, "bf16": Format.BF16, "8-bit": Format.I8, "4-bit": Format.I4}
READ_BYTES = 1 << 29


@dataclass(frozen=True)
class Bounds:
    """``read`` in bytes a second, ``peak`` of each width of weights in operations a second."""

    read: float
    peak: dict[str, float]

    def figures(self) -> dict[str, float]:
        return {"read bandwidth, GB/s": self.read / 1e9} | {
            f"peak of {family}, GFLOP/s": peak / 1e9 for family, peak in self.peak.items()
        }

    def tokens_per_second(self, family: str, workload: Any, parameters: int) -> float:
        """Of a workload whose requests run together: each step reads all weights and multiplies each row with them."""
        bytes_of_step, operations = parameters * BYTES[family], 2.0 * parameters
        seconds = sum(map(len, workload.prompts)) * operations / self.peak[family]
        if workload.shared:
            seconds -= (len(workload.prompts) - 1) * workload.shared * operations / self.peak[family]
        for step in range(1, max(workload.outputs)):
            rows = sum(count > step for count in workload.outputs)
            seconds += max(bytes_of_step / self.read, rows * operations / self.peak[family])
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
    """Of rows enough to hide everything else, with a weight that stays in the caches."""
    rows, width, out = 960, 512, 512
    weight = pack(library, pool, format, [torch.randn(out, width)])
    x, y = Rows.input_of(weight, library, rows), Rows(rows, out)
    program = Program(library, pool)
    for _ in range(8):
        program.linear(x, weight, y)
    blank = torch.zeros(rows, width)
    taken = _best(lambda: program.run_rows(blank), 15)
    return 8 * 2.0 * rows * width * out / taken
