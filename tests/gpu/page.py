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
    told = [section(report) for report in reports if report["ran"] or report["is_dry_run"]]
    page.write_text(HEAD + ("".join(told) or NOTHING))


def section(report: dict[str, Any]) -> str:
    machine = report["machine"]
    name = machine["device"] or "dry run on a CPU: the numbers mean nothing"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines = ["", f"## {name}", "", f"Driver {machine.get('driver', 'none')}; {versions}.", ""]
    for phase, figures in report["phases"].items():
        lines += [f"### {phase}", ""]
        lines += [f"Not run: {figures['skipped']}.", ""] if "skipped" in figures else []
        lines += [f"- ended at {end['case'] or 'its start'}: {end['why']}" for end in figures.get("failures", ())]
        part = PARTS.get(phase)
        lines += [*part(figures), ""] if part and "skipped" not in figures else [""]
    lines += _targets(report.get("targets", []))
    return "\n".join(lines)


def _targets(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["### targets", "", "| | measured | target | met |", "|---|--:|--:|---|"]
    for row in rows:
        met = "yes" if row["met"] else "no"
        lines.append(f"| {row['name']} | {row['measured']:.2f} | {row['op']} {row['target']:g} | {met} |")
    return [*lines, ""]


def _tests(figures: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{value} {name}" for name, value in figures["counts"].items())
    return [counts + ".", *(f"- {one['test']}: {one['why'][:200]}" for one in figures["failed"])]


def _parity(figures: dict[str, Any]) -> list[str]:
    equal = ", ".join(f"{name} {count}" for name, count in figures.get("equal", {}).items())
    lines = [f"Greedy tokens equal to Transformers', of {figures.get('prompts')} prompts: {equal or 'none told'}."]
    for name, differing in figures.get("differing", {}).items():
        lines += [f"- {name}: token {one['at']}, whose logits are {one['logit_gap']:.1e} apart" for one in differing]
    return lines


def _kernels(figures: dict[str, Any]) -> list[str]:
    lines = []
    if "bounds" in figures:
        limits = figures["bounds"]
        bandwidth, peak = limits["bandwidth_bytes_per_s"] / 1e12, limits["tensor_flops_per_s"] / 1e12
        lines += [f"Measured bounds: {bandwidth:.2f} TB/s, {peak:.0f} TFLOP/s.", ""]
    lines += ["| kernel | us | of | share | target |", "|---|--:|---|--:|--:|"]
    for name, one in figures.get("kernels", {}).items():
        if "error" in one:
            lines.append(f"| {name} | | failed: {one['error'][:80]} | | |")
        else:
            lines.append(f"| {name} | {one['us']:.1f} | {one['bound']} | {one['share']:.0%} | {one['target']:.0%} |")
    return lines


def _engine(figures: dict[str, Any]) -> list[str]:
    runs = {name: run.get("tokens_per_s", {}) for name, run in figures.get("runs", {}).items()}
    counts = sorted({int(count) for run in runs.values() for count in run})
    lines = [f"- {name}: {one['error'][:200]}" for name, one in figures.get("errors", {}).items()]
    single = runs.get("graphs", {}).get("1")
    if single and "single_stream_bound_tokens_per_s" in figures:
        share = single / figures["single_stream_bound_tokens_per_s"]
        billions = figures["parameters"] / 1e9
        lines += [f"{billions:.2f} B parameters; a single stream reaches {share:.0%} of what the bandwidth allows."]
    step = figures.get("runs", {}).get("graphs", {}).get("step_s")
    if step:
        lines += [f"A decode step takes {step['engine'] * 1e3:.2f} ms, its kernels {step['kernels'] * 1e3:.2f} ms."]
    late = {name: run.get("compiled_while_serving") for name, run in figures.get("runs", {}).items()}
    told = ", ".join(f"{name} {count}" for name, count in late.items() if count is not None)
    lines += [f"Kernels compiled while requests were served: {told}."] if told else []
    lines += ["Tokens a second by concurrent requests:", "", "| | " + " | ".join(map(str, counts)) + " |"]
    lines.append("|---|" + "--:|" * len(counts))
    for name, run in runs.items():
        cells = [run.get(str(count)) for count in counts]
        lines.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.0f}" for cell in cells) + " |")
    return lines


def _training(figures: dict[str, Any]) -> list[str]:
    lines = ["| precision | ms a step | GB | speedup | memory saved |", "|---|--:|--:|--:|--:|"]
    precisions = figures.get("precisions", {})
    plain = precisions.get("32-true")
    for name, one in precisions.items():
        speedup = f"{plain['step_s'] / one['step_s']:.2f}" if plain else ""
        saved = f"{1 - one['peak_bytes'] / max(plain['peak_bytes'], 1):.0%}" if plain else ""
        lines.append(f"| {name} | {one['step_s'] * 1e3:.1f} | {one['peak_bytes'] / 1e9:.1f} | {speedup} | {saved} |")
    return lines


def _tuning(figures: dict[str, Any]) -> list[str]:
    return [
        f"- {name}: {one['entries'] or 'the default is best'}, {one['default_s'] / one['best_s']:.2f} times as fast"
        for name, one in figures.get("configs", {}).items()
    ]


PARTS = {
    "tests": _tests,
    "parity": _parity,
    "kernels": _kernels,
    "engine-1b": _engine,
    "engine-8b": _engine,
    "training": _training,
    "tuning": _tuning,
}
