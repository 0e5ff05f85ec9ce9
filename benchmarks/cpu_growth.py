"""How a decode step's time grows with sequences and with context, beside the bound of each step.

SmolLM2-135M by the library's own programs, greedy, without engine: the median of some steps at each point, and how many
times the bound that is (``native_bounds``). The bound is measured anew before each point: memory of a machine that
others use is faster at one time than at another. Where the time follows the bound, those multiples are alike.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from common import Report, arguments, median
from common_platform.embedded import smollm2
from native_bounds import SMOLLM2_135M, measure_bounds
from servekit.execution.executor import ExecutorConfig, InProcessExecutor
from servekit.kernels.paged_attention.metadata import StepRows
from servekit.layers.attention import StepInputs
from servekit.models.native_llama import NativeLlama

THREADS, BLOCK = 2, 16
ROWS, CONTEXT = (1, 2, 4, 8, 16, 32, 64), 64
CONTEXTS = (64, 512, 1024, 2048, 4096)
SETTINGS = {"bf16": {"dtype": "bfloat16"}, "8-bit": {"quantization": "int8"}, "4-bit": {"quantization": "int4"}}
ALLOWED = 1.25


def decode_step(model: NativeLlama, dtype: torch.dtype, rows: int, context: int) -> tuple[StepInputs, np.ndarray]:
    """One new token for each of ``rows`` sequences that have ``context`` tokens with it, on caches made for it."""
    blocks = -(-context // BLOCK)
    for attention in model.attentions:
        attention.release()
        attention.bind(rows * blocks + 1, BLOCK, dtype, torch.device("cpu"))
        for part in attention.caches:
            part.zero_()  # the system clears each page at its first use, which is no part of a step
    tables = np.arange(1, rows * blocks + 1, dtype=np.int32).reshape(rows, blocks)
    starts = np.full(rows, context - 1, np.int64)
    given = StepRows(tables, starts, np.ones(rows, np.int64), 0)
    step = StepInputs(torch.arange(1000, 1000 + rows), torch.from_numpy(starts), [given], BLOCK)
    return step, np.arange(rows)


def seconds_of(model: NativeLlama, dtype: torch.dtype, rows: int, context: int, steps: int) -> float:
    step, places = decode_step(model, dtype, rows, context)
    taken = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        model.forward_greedy(step, places)
        taken.append(time.perf_counter() - start)
    return median(taken[2:])  # the first ones record, and find the caches cold


def main() -> None:
    options = arguments(__doc__).parse_args()
    report, steps = Report(), 8 if options.quick else 20
    for family in ("bf16",) if options.quick else SETTINGS:
        executor = InProcessExecutor(smollm2(), ExecutorConfig(num_threads=THREADS, **SETTINGS[family]))
        model = executor.model
        if not isinstance(model, NativeLlama):
            raise SystemExit("the CPU kernels were not built: there is nothing to measure")
        points = [(f"{rows} sequences of {CONTEXT} tokens", rows, CONTEXT) for rows in ROWS]
        points += [(f"1 sequence of {context} tokens", 1, context) for context in CONTEXTS[1:]]
        times: dict[str, float] = {}
        for name, rows, context in points:
            bound = measure_bounds(THREADS).decode_step(family, rows, rows * context, SMOLLM2_135M)
            with torch.inference_mode():
                taken = seconds_of(model, executor.kv_dtype, rows, context, steps)
            times[name] = taken / bound
            report.figure(f"{family}, {name}: ms a step", taken * 1e3)
            report.figure(f"{family}, {name}: times the bound", times[name])
        by_rows, by_context = (
            list(times.values())[: len(ROWS)],
            [times[points[0][0]], *list(times.values())[len(ROWS) :]],
        )
        for what, found in (("sequences", by_rows), ("context", by_context)):
            report.target(
                f"{family}: times the bound over {what}, most by least", max(found) / min(found), "<=", ALLOWED
            )
        executor.stop()
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
