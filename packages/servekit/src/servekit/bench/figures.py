"""What a run showed, under the names that ``vllm bench serve`` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common_platform.errors import ConfigError
from servekit.bench.sse import Record

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def figures_of(records: Sequence[Record], duration_s: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """Counts, throughput, and each metric's mean, median, deviation and percentiles in milliseconds."""
    good = [record for record in records if record.succeeded]
    num_input, num_output = sum(r.num_input for r in good), sum(r.num_output for r in good)
    made: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
    }
    for name, values in _values(good).items():
        made |= _spread(name, np.asarray(values or [0.0]) * 1e3, percentiles)
    return made


def _values(good: Sequence[Record]) -> dict[str, list[float]]:
    begun = [record for record in good if record.first]
    return {
        "ttft": [record.first - record.began for record in begun],
        "tpot": [(r.last - r.first) / (r.num_output - 1) for r in begun if r.num_output > 1],
        "itl": [gap for record in begun for gap in record.gaps],
        "e2el": [record.ended - record.began for record in good],
    }


def _spread(name: str, values: np.ndarray, percentiles: Sequence[float]) -> dict[str, float]:
    made = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return made | {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}


def details_of(records: Sequence[Record]) -> dict[str, Any]:
    """Every request by itself; seconds."""
    return {
        "input_lens": [record.num_input for record in records],
        "output_lens": [record.num_output for record in records],
        "ttfts": [record.first - record.began if record.first else 0.0 for record in records],
        "itls": [record.gaps for record in records],
        "errors": [record.error for record in records],
    }


def table(figures: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    rows = [
        ("Successful requests", figures["completed"]),
        ("Failed requests", figures["failed"]),
        ("Benchmark duration (s)", figures["duration"]),
        ("Total input tokens", figures["total_input_tokens"]),
        ("Total generated tokens", figures["total_output_tokens"]),
        ("Request throughput (req/s)", figures["request_throughput"]),
        ("Output token throughput (tok/s)", figures["output_throughput"]),
        ("Total token throughput (tok/s)", figures["total_token_throughput"]),
    ]
    lines = ["{s:{c}^{n}}".format(s=" Serving Benchmark Result ", n=58, c="="), *map(_line, rows)]
    for name in metrics:
        lines.append("{s:{c}^{n}}".format(s=METRICS[name], n=58, c="-"))
        kinds = ["mean", "median", *(f"p{p:g}" for p in percentiles)]
        lines += [_line((f"{k[0].upper()}{k[1:]} {name.upper()} (ms)", figures[f"{k}_{name}_ms"])) for k in kinds]
    return "\n".join([*lines, "=" * 58])


def _line(row: tuple[str, float]) -> str:
    name, value = row
    return f"{name + ':':<42}{value:>16}" if isinstance(value, int) else f"{name + ':':<42}{value:>16.2f}"


def parsed_metrics(text: str) -> list[str]:
    """Raises ConfigError where ``text`` is not a list of metrics."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            limit = f"of {', '.join(METRICS)}"
            raise ConfigError("percentile_metrics", name, limit, flag="--percentile-metrics")
    return names


def parsed_percentiles(text: str) -> list[float]:
    """Raises ConfigError where ``text`` is not a list of numbers from 0 to 100."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1.0]
    if not all(0 <= value <= 100 for value in found):
        raise ConfigError("metric_percentiles", text, "numbers 0..100", flag="--metric-percentiles")
    return found
