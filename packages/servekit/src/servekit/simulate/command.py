"""What the commands of ``servekit simulate`` do with their settings."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console

from common_platform.errors import ConfigError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.simulate.cost import CostModel
from servekit.simulate.fit import fit
from servekit.simulate.job import Job
from servekit.simulate.profile import read_profile
from servekit.simulate.report import Report
from servekit.simulate.show import plot_report, print_report
from servekit.simulate.simulation import SimulationConfig, simulate
from servekit.simulate.synthetic import Lengths, SyntheticWorkload
from servekit.simulate.trace import read_trace


def run(
    *,
    cost: str | None,
    trace: Path | None,
    prompt_tokens: str,
    output_tokens: str,
    num_replicas: int,
    router: str,
    num_blocks: int,
    block_size: int,
    enable_prefix_caching: bool,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    long_prefill_token_threshold: int,
    scheduling_policy: str,
    step_by_step: bool,
    json_file: Path | None,
    plot_file: Path | None,
    **workload: float | str,
) -> Report:
    """Simulate, then print a table, or write what files are asked for; ``workload``: of ``SyntheticWorkload``.

    Raises:
        ConfigError: a setting, or a line of the trace, is out of its range.
        ResourceError: a file cannot be written, or matplotlib is missing.
    """
    if cost is None:
        raise ConfigError("cost", "nothing", "a file of `servekit simulate fit`, or JSON", flag="--cost")
    config = SimulationConfig(
        cost=CostModel.load(cost),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            long_prefill_token_threshold=long_prefill_token_threshold,
            policy=scheduling_policy,
        ),
        cache=CacheConfig(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching),
        num_replicas=num_replicas,
        router=router,
        fast_forward=not step_by_step,
    )
    report = Report.of(simulate(_jobs(trace, prompt_tokens, output_tokens, workload), config))
    if json_file is not None:
        report.save(json_file)
    if plot_file is not None:
        plot_report(report, plot_file)
    if json_file is None:
        print_report(report, Console())
    return report


def _jobs(trace: Path | None, prompt_tokens: str, output_tokens: str, workload: dict[str, float | str]) -> list[Job]:
    if trace is not None:
        return read_trace(trace)
    prompt = Lengths.parse(prompt_tokens, "prompt_tokens")
    output = Lengths.parse(output_tokens, "output_tokens")
    return SyntheticWorkload(prompt_tokens=prompt, output_tokens=output, **workload).jobs()  # type: ignore[arg-type]


def fit_profile(profile: Path, out: Path | None) -> str:
    """The cost model of ``profile``, saved to ``out``: JSON with its errors.

    Raises:
        ConfigError: the profile cannot be read.
        ResourceError: ``out`` cannot be written.
    """
    found = fit(read_profile(profile))
    if out is not None:
        found.cost.save(out)
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode()


def numbers_of(text: str, name: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(name, text, "whole numbers with commas between them", flag=flag) from None
