"""docs/benchmarks/gpu.md, made of the JSON files that runs on GPUs have left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = """# Figures on GPUs

Made by `python -m tests.gpu --page FILE...`; do not edit. The files come from `nox -s gpu`
(`python -m tests.gpu`), which proves every kernel on the device before it times anything.
"""
NOTHING = "\nNo run on a GPU has been recorded yet. What is expected of the first one is in [kernels.md](kernels.md).\n"


def write_page(page: Path, files: list[Path]) -> None:
    reports = [json.loads(path.read_text()) for path in files]
    told = [_section(report) for report in reports if report["ran"] or report["is_dry_run"]]
    page.write_text(HEAD + ("".join(told) or NOTHING))


def _section(report: dict[str, Any]) -> str:
    machine = report["machine"]
    name = machine["device"] or "dry run on a CPU: the numbers mean nothing"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines = ["", f"## {name}", "", f"Driver {machine.get('driver', 'none')}; {versions}.", ""]
    for phase, figures in report["phases"].items():
        lines += [f"### {phase}", ""]
        if "error" in figures or "skipped" in figures:
            lines += [f"Did not finish: {figures.get('error') or figures.get('skipped')}.", ""]
            continue
        lines += [*PARTS[phase](figures), ""]
    return "\n".join(lines)


def _tests(figures: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{value} {name}" for name, value in figures["counts"].items())
    return [counts + ".", *(f"- {one['test']}: {one['why']}" for one in figures["failed"])]


def _parity(figures: dict[str, Any]) -> list[str]:
    equal = ", ".join(f"{name} {count}" for name, count in figures["equal"].items())
    return [f"Greedy tokens equal to Transformers', of {figures['prompts']} prompts: {equal}."]


def _kernels(figures: dict[str, Any]) -> list[str]:
    limits = figures["bounds"]
    bandwidth, peak = limits["bandwidth_bytes_per_s"] / 1e12, limits["tensor_flops_per_s"] / 1e12
    lines = [
        f"Measured bounds: {bandwidth:.2f} TB/s, {peak:.0f} TFLOP/s.",
        "",
        "| kernel | us | of | share | target |",
        "|---|--:|---|--:|--:|",
    ]
    for one in figures["kernels"]:
        if "error" in one:
            lines.append(f"| {one['name']} | | failed: {one['error'][:80]} | | |")
        else:
            lines.append(
                f"| {one['name']} | {one['us']:.1f} | {one['bound']} | {one['share']:.0%} | {one['target']:.0%} |"
            )
    return lines


def _engine(figures: dict[str, Any]) -> list[str]:
    runs = {name: figures[name] for name in ("graphs", "eager") if name in figures} | figures["peers"]
    counts = sorted({int(count) for run in runs.values() for count in run["tokens_per_s"]})
    billions, share = figures["parameters"] / 1e9, figures["single_stream_share"]
    lines = [
        f"{billions:.2f} B parameters; a single stream reaches {share:.0%} of what the bandwidth allows.",
        "Tokens a second by concurrent requests:",
        "",
        "| | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "--:|" * len(counts),
    ]
    for name, run in runs.items():
        cells = [run["tokens_per_s"].get(str(count)) for count in counts]
        lines.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.0f}" for cell in cells) + " |")
    return lines


def _training(figures: dict[str, Any]) -> list[str]:
    lines = ["| precision | ms a step | GB | speedup | memory saved |", "|---|--:|--:|--:|--:|"]
    for name in ("32-true", "bf16-mixed", "bf16-true"):
        one = figures[name]
        lines.append(
            f"| {name} | {one['step_s'] * 1e3:.1f} | {one['peak_bytes'] / 1e9:.1f} | {one.get('speedup', 1):.2f} "
            f"| {one.get('memory_saved', 0):.0%} |"
        )
    return lines


PARTS = {
    "tests": _tests,
    "parity": _parity,
    "kernels": _kernels,
    "engine-1b": _engine,
    "engine-8b": _engine,
    "training": _training,
}
