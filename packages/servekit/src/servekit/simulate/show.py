"""A report for people: a table in the terminal, or curves in a file."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Column, Table

from common_platform.errors import ResourceError
from servekit.simulate.report import Latency, Report

LATENCIES = {
    "ttft_s": "time to first token",
    "itl_s": "between tokens",
    "e2e_s": "whole request",
    "queue_s": "in queue",
}
MOST_REPLICAS = 8  # shown one by one
LEAST_SHOWN_S = 1e-6  # what is less, 0 included, has no place on a logarithmic axis


def print_report(report: Report, console: Console) -> None:
    """The figures, the latencies in milliseconds, and the replicas where there are a few."""
    console.print(_figures(report), _latencies(report))
    if 1 < len(report.replicas) <= MOST_REPLICAS:
        console.print(_replicas(report))


def _figures(report: Report) -> Table:
    table = Table(show_header=False)
    peak = max(replica.peak_kv_usage for replica in report.replicas)
    mean = sum(replica.mean_kv_usage for replica in report.replicas) / len(report.replicas)
    rows = {
        "requests": f"{report.finished:,} ended, {report.refused:,} refused",
        "duration": f"{report.duration_s:,.2f} s",
        "throughput": f"{report.requests_per_s:,.2f} requests/s, {report.output_tokens_per_s:,.1f} output tokens/s",
        "prompt and output": f"{report.tokens_per_s:,.1f} tokens/s",
        "prefix cache": f"{report.prefix_hit_rate:.1%} of prompt tokens",
        "preemptions": f"{report.preemptions:,}",
        "KV use": f"{mean:.1%} in the mean, {peak:.1%} at the most",
        "replicas": f"{len(report.replicas):,}, the fullest at {report.imbalance:.2f} times the mean",
    }
    if report.first_refusal:
        rows["first refusal"] = report.first_refusal
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _latencies(report: Report) -> Table:
    names = ("milliseconds", *Latency.__struct_fields__)
    table = Table(*(Column(name, no_wrap=True) for name in names))
    for field, name in LATENCIES.items():
        values = getattr(report, field)
        if values is not None:
            table.add_row(name, *(f"{value * 1e3:,.1f}" for value in msgspec.structs.astuple(values)))
    return table


def _replicas(report: Report) -> Table:
    table = Table("replica", "requests", "output tokens", "busy", "KV use", "hits", "preemptions")
    for index, one in enumerate(report.replicas):
        shares = (f"{one.busy_share:.1%}", f"{one.mean_kv_usage:.1%}", f"{one.prefix_hit_rate:.1%}")
        table.add_row(str(index), f"{one.requests:,}", f"{one.output_tokens:,}", *shares, f"{one.preemptions:,}")
    return table


def plot_report(report: Report, path: str | Path) -> None:
    """Memory and requests over time, and the quantiles of latency, in the format that the file's ending names.

    Raises:
        ResourceError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "plot: matplotlib is missing; install servekit[plot], or use --json"
        raise ResourceError("plot", str(path), code="library_missing", flag="--json", message=message) from error
    figure = Figure(figsize=(10, 8), layout="constrained")
    use, requests, quantiles = figure.subplots(3, 1)
    at = [point.at_s for point in report.kv_over_time]
    use.plot(at, [point.kv_usage * 100 for point in report.kv_over_time])
    use.set(xlabel="seconds", ylabel="KV use, %", ylim=(0, 105))
    requests.plot(at, [point.running for point in report.kv_over_time], label="running")
    requests.plot(at, [point.waiting for point in report.kv_over_time], label="waiting")
    requests.set(xlabel="seconds", ylabel="requests")
    requests.legend()
    for field, name in LATENCIES.items():
        values = getattr(report, field)
        if values is not None:
            shown = [max(value, LEAST_SHOWN_S) * 1e3 for value in msgspec.structs.astuple(values)[1:5]]
            quantiles.plot(Latency.__struct_fields__[1:5], shown, marker="o", label=name)
    quantiles.set(ylabel="milliseconds", yscale="log")
    quantiles.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ResourceError("plot", str(path), f"a file that can be written ({error})", flag="--plot") from error
