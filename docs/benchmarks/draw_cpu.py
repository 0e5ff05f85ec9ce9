"""Draws ``cpu.png`` and prints the tables of ``cpu.md`` from a file of ``benchmarks/cpu_serving.py --into``.

python docs/benchmarks/draw_cpu.py docs/benchmarks/data/cpu_serving-epyc-avx512-2cores.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SIDES = {  # width of the weights -> sides, ours first
    "bf16": ("servekit-bf16", "llama.cpp-BF16", "openvino-bf16"),
    "8 bits": ("servekit-int8", "llama.cpp-Q8_0", "openvino-int8"),
    "4 bits": ("servekit-int4", "llama.cpp-Q4_0"),
}
COLOURS = {"servekit": "#1f5fbf", "llama.cpp": "#d98b2b", "openvino": "#7a7a7a"}
DECODES = (1, 4, 8, 16, 32, 64)
WORKLOADS = (
    *(f"decode {n}" for n in DECODES),
    "prefill 1024",
    "prefill 4096",
    "long decode",
    "mixed",
    "shared prefix",
)


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    figures = found["figures"]
    print(speeds(figures))
    print()
    print(ratios(found["targets"]))
    draw(figures)


def speed(figures: dict[str, float], workload: str, side: str) -> float | None:
    return figures.get(f"{workload}: {side}, tokens/s")


def speeds(figures: dict[str, float]) -> str:
    """Tokens a second of every side, as a Markdown table."""
    lines = ["| weights | | " + " | ".join(WORKLOADS) + " |", "|---|---|" + "--:|" * len(WORKLOADS)]
    for width, sides in SIDES.items():
        for i, side in enumerate(sides):
            cells = [speed(figures, name, side) for name in WORKLOADS]
            shown = " | ".join("" if cell is None else f"{cell:,.0f}" for cell in cells)
            lines.append(f"| {'' if i else width} | {side} | {shown} |")
    return "\n".join(lines)


def ratios(targets: list[dict[str, Any]]) -> str:
    """Every comparison with a peer, as a Markdown table."""
    lines = ["| | measured | target | |", "|---|--:|--:|---|"]
    for target in (t for t in targets if "share of the bound" not in t["name"]):
        met = "met" if target["met"] else "missed"
        lines.append(f"| {target['name']} | {target['measured']:.2f} | {target['target']:g} | {met} |")
    return "\n".join(lines)


def draw(figures: dict[str, float]) -> None:
    _, (alone, crowd) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    bars = [(side, speed(figures, "decode 1", side)) for sides in SIDES.values() for side in sides]
    bars = [(side, value) for side, value in bars if value is not None]
    alone.barh([s for s, _ in bars], [v for _, v in bars], color=[COLOURS[s.rsplit("-", 1)[0]] for s, _ in bars])
    alone.invert_yaxis()
    alone.set(title="One sequence", xlabel="tokens/s, prefill counted")
    for sides, style in zip(SIDES.values(), ("-", "--", ":"), strict=True):
        for side in sides:
            points = [(n, speed(figures, f"decode {n}", side)) for n in DECODES]
            line(crowd, points, side, color=COLOURS[side.rsplit("-", 1)[0]], linestyle=style)
    crowd.set_xscale("log", base=2)
    crowd.set_xticks(DECODES, [str(n) for n in DECODES])
    crowd.set_xlabel("sequences")
    crowd.legend(fontsize=8)
    crowd.grid(alpha=0.3)
    crowd.set(title="Tokens a second over concurrency", ylabel="tokens/s")
    plt.savefig(HERE / "cpu.png", dpi=110)


def line(axis: Any, points: list[tuple[int, float | None]], label: str, **style: Any) -> None:
    there = [(n, value) for n, value in points if value is not None]
    if there:
        axis.plot([n for n, _ in there], [value for _, value in there], marker="o", label=label, **style)


if __name__ == "__main__":
    main()
