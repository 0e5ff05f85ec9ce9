"""Where a decode step's time goes on a CPU: each kind of operation, and what is left for Python.

SmolLM2-135M, ``LLM.generate`` of sequences of 32 tokens in and 64 out. The native calls of the model and of the sampler
are timed from Python; what is left is scheduling, the batch's arrays, sampling and answers, and should be 5 % of a run
at most. Operations are timed inside the library, by the thread that makes the call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import Report, arguments
from common_platform.embedded import smollm2
from servekit import LLM, SamplingParams
from servekit.kernels.argmax.cpu import NativeArgmax
from servekit.kernels.native import Program

THREADS, OUTPUTS = 2, 64
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "8-bit": {"quantization": "int8"},
    "4-bit": {"quantization": "int4"},
}


class Clock:
    """Seconds inside of functions that it has wrapped, and the programs that were run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.programs: dict[int, Program] = {}

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(first: Any, *rest: Any) -> Any:
            if isinstance(first, Program):
                self.programs[id(first)] = first
            start = time.perf_counter()
            answer = function(first, *rest)
            self.seconds += time.perf_counter() - start
            return answer

        return timed

    def operations(self) -> dict[str, float]:
        """Seconds of each kind since it was asked last."""
        found: dict[str, float] = {}
        for program in self.programs.values():
            for name, seconds in program.profile().items():
                found[name] = found.get(name, 0.0) + seconds
        return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    report, clock = Report(), Clock()
    Program.run, Program.run_rows = clock.wrap(Program.run), clock.wrap(Program.run_rows)  # type: ignore[method-assign]
    NativeArgmax.__call__ = clock.wrap(NativeArgmax.__call__)  # type: ignore[method-assign]
    for name, settings in SETTINGS.items():
        llm = LLM(str(smollm2()), num_threads=THREADS, max_num_seqs=64, kv_cache_memory_bytes=1 << 30, **settings)
        llm.collective_rpc(write_cache)
        for rows in (1, 16) if options.quick else (1, 8, 16, 64):
            measure(report, clock, llm, name, rows, 2 if options.quick else 4)
        clock.programs.clear()
        del llm
    report.finish(as_json=options.json)


def write_cache(runner: Any) -> None:
    """Take the memory of keys and values: the system clears each page at its first use, which is no part of a step."""
    for attention in runner.model.attentions:
        for part in attention.caches:
            part.zero_()


def measure(report: Report, clock: Clock, llm: LLM, name: str, rows: int, rounds: int) -> None:
    params = SamplingParams(max_tokens=OUTPUTS, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [[1000 + 37 * row + i for i in range(32)] for row in range(rows)]
    taken, native, operations = [], [], []
    for i in range(rounds + 1):
        clock.operations()
        llm.reset_prefix_cache()
        clock.seconds, start = 0.0, time.perf_counter()
        llm.generate(prompts, [params] * rows)
        if i:  # the first one records
            taken.append(time.perf_counter() - start)
            native.append(clock.seconds)
            operations.append(clock.operations())
    best = taken.index(min(taken))
    at = f"{name}, {rows} sequences"
    report.figure(f"{at}: run, ms a step", taken[best] / OUTPUTS * 1e3)
    for operation, seconds in sorted(operations[best].items(), key=lambda item: -item[1]):
        report.figure(f"{at}: {operation}, ms a step", seconds / OUTPUTS * 1e3)
    report.target(f"{at}: share of Python", 1 - native[best] / taken[best], "<=", 0.05)


if __name__ == "__main__":
    main()
