"""What every benchmark shares: the machine's facts, fair interleaving, and the one JSON object it prints.

A script asks one question. It takes ``--json`` (print the object alone) and ``--quick`` (under two minutes), and
exits 0 also when a target is missed: the object says so.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

OPS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")


@dataclass(frozen=True)
class Target:
    """A figure, what it should be, and whether it is."""

    name: str
    measured: float
    target: float
    op: str  # "<=" or ">="
    met: bool


@dataclass
class Report:
    """The figures of one run; ``finish`` prints them."""

    figures: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)

    def figure(self, name_with_unit: str, value: float) -> float:
        self.figures[name_with_unit] = _rounded(value)
        return value

    def target(self, name: str, measured: float, op: str, target: float) -> None:
        self.targets.append(Target(name, _rounded(measured), target, op, OPS[op](measured, target)))

    def body(self) -> dict[str, Any]:
        """The object that ``finish`` prints."""
        return {
            "commit": commit(),
            "machine": machine_facts(),
            "figures": self.figures,
            "targets": [asdict(t) for t in self.targets],
            "peers": self.peers,
        }

    def finish(self, *, as_json: bool) -> None:
        if as_json:
            print(json.dumps(self.body(), indent=1))
            return
        for name, value in self.figures.items():
            print(f"{name:<58} {value:>14,.6g}")
        for t in self.targets:
            print(f"{'met   ' if t.met else 'MISSED'} {t.name}: {t.measured:g} {t.op} {t.target:g}")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The two flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: under two minutes")
    return parser


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each side once a round, in an order that turns, so that drift of the machine hits all alike."""
    names = list(sides)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            measured[name].append(sides[name]())
    return measured


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def commit() -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def machine_facts(packages: Sequence[str] = ("torch", "numpy", "transformers")) -> dict[str, Any]:
    """CPU name, instruction sets, usable cores, device and versions."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": _device(),
        "versions": {"python": platform.python_version()} | _versions(packages),
    }


def _cpu() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), set()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    flags = lines.get("flags") or lines.get("Features") or ""
    return lines.get("model name", platform.machine()), set(flags.split())


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "cpu"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
