"""What a device of an H100's class should reach, held against what was measured: rows as `benchmarks/` has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def targets(phases: dict[str, Any]) -> list[Row]:
    """Those whose figures are there: a stage that did not run, or failed before it had one, has no row."""
    return [
        {"name": name, "measured": measured, "target": target, "op": op, "met": _met(measured, op, target)}
        for name, measured, op, target in (*_kernels(phases), *_engine(phases), *_training(phases))
    ]


def _met(measured: float, op: str, target: float) -> bool:
    return measured >= target if op == ">=" else measured <= target


def _kernels(phases: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    found = phases.get("kernels", {}).get("kernels", {})
    timed = {name: one for name, one in found.items() if "us" in one}
    for name, one in timed.items():
        if name.startswith(("decode attention", "prefill attention")) or _is_small_product(name):
            yield f"{name}: share of {one['bound']}", one["share"], ">=", one["target"]
        loop = timed.get(name.replace("experts bf16,", "experts bf16 by a loop of torch,") + " (to compare)")
        if loop:
            yield f"{name}: times as fast as a loop of torch", loop["us"] / one["us"], ">=", 2.5


def _is_small_product(name: str) -> bool:
    return name.startswith("linear") and name.endswith((", 1 tokens", ", 16 tokens"))


def _engine(phases: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    for phase in ("engine-1b", "engine-8b"):
        figures = phases.get(phase, {})
        runs = figures.get("runs", {})
        ours, theirs = (runs.get(name, {}).get("tokens_per_s", {}) for name in ("graphs", "transformers"))
        step = runs.get("graphs", {}).get("step_s", {})
        if {"engine", "kernels"} <= set(step):
            yield f"{phase}: a decode step over its kernels", step["engine"] / step["kernels"], "<=", 1.1
        bound = figures.get("single_stream_bound_tokens_per_s")
        if bound and "1" in ours and phase == "engine-8b":
            yield f"{phase}: a single stream over the bandwidth's bound", ours["1"] / bound, ">=", 0.8
        if ours and theirs:
            most, batch = (max(each, key=int) for each in (ours, theirs))
            name = f"{phase}: {most} concurrent requests over Transformers' batch of {batch}"
            yield name, ours[most] / theirs[batch], ">=", 20.0


def _training(phases: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    precisions = phases.get("training", {}).get("precisions", {})
    if {"32-true", "bf16-mixed"} <= set(precisions):
        plain, mixed = precisions["32-true"], precisions["bf16-mixed"]
        yield "training in bf16-mixed: times as fast as float32", plain["step_s"] / mixed["step_s"], ">=", 1.8
        saved = 1 - mixed["peak_bytes"] / max(plain["peak_bytes"], 1)
        yield "training in bf16-mixed: memory saved", saved, ">=", 0.4
