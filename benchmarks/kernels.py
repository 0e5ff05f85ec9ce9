"""What the Triton kernels take on each device they are compiled for, and what they should cost there; no GPU is needed.

python benchmarks/kernels.py --write    # makes docs/benchmarks/kernels.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common_platform.kernels import TARGETS, specializations_of, works_of
from common_platform.kernels.compiling import compile_for

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "kernels.md"
PACKAGES = ("servekit", "trainkit")
HEAD = """# GPU kernels: what they take, and what they should cost

Made by `python benchmarks/kernels.py --write`; do not edit. Every kernel is compiled to the binary of each device,
without one. Cells: registers a thread / KiB of shared memory a block. A spill, or more shared memory than a block may
have, fails `nox -s kernels`. An empty cell: the device does not compute with that type.

"""
COSTS = """
## What a call must move and compute at the least

Written down before the first GPU is at hand, for the first timing to be judged by: bytes read and written once, two
FLOPs a multiply-add. `target` is the share that we want of the bound: of the memory bandwidth as measured by a copy, or
of the tensor cores' peak as measured by a large matrix product. On an H100 SXM (3.35 TB/s, 989 TFLOP/s in bf16) the
time at the target is in the last column.

"""


def measured() -> list[dict[str, object]]:
    """One record a specialization."""
    records = []
    for package in PACKAGES:
        for operation, one in specializations_of(package):
            figures = {}
            for target in one.targets:
                done = compile_for(one, target)
                figures[target] = {"registers": done.registers, "spills": done.spills, "shared": done.shared}
            records.append({"operation": f"{package}.{operation}", "kernel": one.title, "targets": figures})
    return records


def page(records: list[dict[str, object]]) -> str:
    lines = ["| operation | kernel | " + " | ".join(TARGETS) + " |", "|---|---|" + "---|" * len(TARGETS)]
    for record in records:
        figures = record["targets"]
        cells = [_cell(figures.get(target)) for target in TARGETS]  # type: ignore[attr-defined]
        lines.append(f"| {record['operation']} | {record['kernel']} | " + " | ".join(cells) + " |")
    costs = [
        "| operation | shape | MB | GFLOP | bound | target | H100 at the target |",
        "|---|---|--:|--:|---|--:|--:|",
    ]
    for package in PACKAGES:
        for work in works_of(package):
            seconds = work.bytes / 3.35e12 if work.bound == "bandwidth" else work.flops / 989e12
            costs.append(
                f"| {work.operation} | {work.shape} | {work.bytes / 1e6:.1f} | {work.flops / 1e9:.2f} | {work.bound} "
                f"| {work.target:.0%} | {seconds / work.target * 1e6:.1f} us |"
            )
    return HEAD + "\n".join(lines) + "\n" + COSTS + "\n".join(costs) + "\n"


def _cell(figures: dict[str, int] | None) -> str:
    if figures is None:
        return ""
    spills = f" ({figures['spills']} spilt)" if figures["spills"] else ""
    return f"{figures['registers']} / {figures['shared'] / 1024:.1f}{spills}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/kernels.md")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="nothing is slow here")
    arguments = parser.parse_args()
    records = measured()
    if arguments.write:
        PAGE.write_text(page(records))
    if arguments.json:
        print(json.dumps({"kernels": records}))
    bad = [r for r in records if any(f["spills"] for f in r["targets"].values())]  # type: ignore[attr-defined]
    print(f"{len(records)} kernels, {len(bad)} that spill", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
