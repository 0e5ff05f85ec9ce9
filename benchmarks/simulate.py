"""How fast the simulator is: tokens of a simulated engine per second of this machine, decode-heavy.

10,000 requests, 200 tokens in and about 200 out, on one replica that is kept nearly full, at 64 and at 256 rows; the
slow way, row by row and step by step, beside it in the same run, and their answers compared.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from common import Report, arguments, interleaved, median
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.simulate import CostModel, Job, Outcome, SimulationConfig, simulate
from servekit.simulate.report import Report as Simulated
from servekit.simulate.synthetic import Lengths, SyntheticWorkload

COST = CostModel(step_s=5e-3, token_s=2e-5, row_s=1e-5, context_s=1e-8, pair_s=1e-9)
ROWS = (64, 256)
LENGTH = 200


def config_of(rows: int, *, caching: bool) -> SimulationConfig:
    blocks = rows * math.ceil(2 * LENGTH / 16) + rows
    scheduler = SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=2048, max_model_len=4 * LENGTH)
    return SimulationConfig(
        cost=COST, scheduler=scheduler, cache=CacheConfig(num_blocks=blocks, enable_prefix_caching=caching)
    )


def workload_of(rows: int, num_requests: int, output: str) -> SyntheticWorkload:
    """Arrivals at 90 % of what ``rows`` rows can take."""
    step_s = COST.seconds(rows, rows, rows * LENGTH * 3 // 2, 0) + rows / LENGTH * COST.token_s * LENGTH
    return SyntheticWorkload(
        num_requests=num_requests,
        request_rate=0.9 * rows / (LENGTH * step_s),
        prompt_tokens=Lengths.parse(f"fixed:{LENGTH}", "prompt_tokens"),
        output_tokens=Lengths.parse(output, "output_tokens"),
    )


class Side:
    """One way to simulate a workload: output tokens a second of CPU time, and of wall time beside it.

    The simulator is one thread that never waits, so the two differ by what else the machine does.
    """

    def __init__(self, workload: SyntheticWorkload, config: SimulationConfig) -> None:
        self._workload, self._config = workload, config
        self.by_wall: list[float] = []

    def __call__(self) -> float:
        jobs = self._workload.jobs()
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = simulate(jobs, self._config)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        tokens = sum(record.num_output for record in outcome.records)
        self.by_wall.append(tokens / wall)
        return tokens / cpu


def told(outcome: Outcome) -> list[tuple[float, ...]]:
    return [(r.scheduled, r.first_token, r.finished, r.num_preemptions, r.num_cached) for r in outcome.records]


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    num_requests, rounds = (2000, 3) if options.quick else (10_000, 5)
    for rows in ROWS:
        fixed = workload_of(rows, num_requests, f"fixed:{LENGTH}")
        varied = workload_of(rows, num_requests, f"uniform:{LENGTH // 2}:{LENGTH * 3 // 2}")
        config, plain = config_of(rows, caching=True), config_of(rows, caching=False)
        sides = {
            "fixed": Side(fixed, config),
            "varied": Side(varied, config),
            "no_prefix_cache": Side(fixed, plain),
            "step_by_step": Side(fixed, replace(config, fast_forward=False)),
        }
        measured = {name: median(values) for name, values in interleaved(sides, rounds).items()}
        for name, side in sides.items():
            report.figure(f"output_tokens_per_cpu_s_{rows}_rows_{name}", measured[name])
            report.figure(f"output_tokens_per_wall_s_{rows}_rows_{name}", median(side.by_wall))
        report.figure(f"prompt_and_output_tokens_per_cpu_s_{rows}_rows_fixed", 2 * measured["fixed"])
        report.figure(f"times_faster_than_step_by_step_{rows}_rows", measured["fixed"] / measured["step_by_step"])
        by_wall = median(sides["fixed"].by_wall)
        report.target(f"output tokens simulated in a second of wall time, {rows} rows", by_wall, ">=", 1e6)
        few = workload_of(rows, 500, f"uniform:{LENGTH // 2}:{LENGTH * 3 // 2}").jobs()
        report.target(f"requests told differently by the slow way, {rows} rows", differences(few, config), "<=", 0)
        running = Simulated.of(simulate(fixed.jobs(), config))
        report.figure(f"simulated_output_tokens_per_s_{rows}_rows", running.output_tokens_per_s)
    report.finish(as_json=options.json)


def differences(jobs: list[Job], config: SimulationConfig) -> int:
    fast, slow = told(simulate(jobs, config)), told(simulate(jobs, replace(config, fast_forward=False)))
    return sum(one != other for one, other in zip(fast, slow, strict=True))


if __name__ == "__main__":
    main()
