"""What a device is doing: load, memory and, where it can be read, energy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc")
RAPL = Path("/sys/class/powercap")


class CpuLoad:
    """The share of all cores' time that was not idle since it was asked for last."""

    def __init__(self) -> None:
        self._before = _cpu_times()

    def percent(self) -> float:
        now = _cpu_times()
        total, idle = now[0] - self._before[0], now[1] - self._before[1]
        self._before = now
        return 100.0 * (total - idle) / total if total else 0.0


def cpu_stats(load: CpuLoad) -> dict[str, float]:
    """Percentages of cores, memory and swap that are in use, by Lightning's names; empty where Linux's /proc is not."""
    sizes = _memory_sizes()
    if not sizes:
        return {}
    swap, total = sizes.get("SwapTotal", 0), sizes["MemTotal"]
    return {
        "cpu_percent": load.percent(),
        "cpu_vm_percent": 100.0 * (total - sizes.get("MemAvailable", 0)) / total,
        "cpu_swap_percent": 100.0 * (swap - sizes.get("SwapFree", 0)) / swap if swap else 0.0,
    }


def device_memory(device: torch.device) -> dict[str, float]:
    """torch's own counts of a device's memory, in bytes; empty where it keeps none."""
    if device.type in ("cuda", "xpu"):
        return {name: float(value) for name, value in torch.get_device_module(device).memory_stats(device).items()}
    if device.type == "mps":
        names = ("current_allocated_memory", "driver_allocated_memory")
        return {name: float(getattr(torch.mps, name)()) for name in names}
    return {}


class Energy:
    """Joules that the machine's processors have used since this object was made, where their counters can be read.

    CPUs count in /sys/class/powercap (RAPL), which often only the administrator may read; NVIDIA's devices count
    through NVML, if pynvml is installed.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self._counters = _rapl_counters(rapl) | _nvml_counter(device)
        self._before = {name: read() for name, (read, _) in self._counters.items()}
        self._used = dict.fromkeys(self._counters, 0.0)

    def joules(self) -> dict[str, float]:
        """By counter, ``energy_cpu0_j`` or ``energy_device_j``."""
        for name, (read, wraps_at) in self._counters.items():
            now = read()
            gained = now - self._before[name]
            self._used[name] += gained if gained >= 0 else gained + wraps_at  # the counter began anew
            self._before[name] = now
        return {f"energy_{name}_j": used for name, used in self._used.items()}


Counter = tuple[Callable[[], float], float]  # joules, and where the counter begins anew


def _rapl_counters(root: Path) -> dict[str, Counter]:
    found: dict[str, Counter] = {}
    for package in sorted(root.glob("*-rapl:[0-9]*")):
        if package.name.count(":") != 1:
            continue  # a part of a package that is counted in it
        try:
            range_uj = float((package / "max_energy_range_uj").read_text())
            float((package / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
        found[f"cpu{package.name.rpartition(':')[2]}"] = (_reader(package / "energy_uj"), range_uj / 1e6)
    return found


def _reader(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text()) / 1e6


def _nvml_counter(device: torch.device) -> dict[str, Counter]:
    if device.type != "cuda" or find_spec("pynvml") is None:
        return {}
    nvml: Any = import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return {}
    return {"device": (lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3, float("inf"))}


def _cpu_times() -> tuple[float, float]:
    """Ticks of all cores, and those in which they were idle."""
    stat = PROC / "stat"
    if not stat.exists():
        return 0.0, 0.0
    ticks = [float(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def _memory_sizes() -> dict[str, float]:
    """Of /proc/meminfo, in KiB."""
    path = PROC / "meminfo"
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): float(row[1]) for row in rows}
