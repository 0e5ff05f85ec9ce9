"""What each driver says: small questions to torch, kept apart so that a test can answer in a driver's place."""

from __future__ import annotations

import os
import platform as host
from collections.abc import Callable
from pathlib import Path

import torch

from common_platform.platforms.platform import DeviceFacts, Platform

FLOATS = ("float32", "float16")
X86_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
AMD_FLOAT8 = ("gfx94", "gfx95", "gfx12")
ARM_FLAGS = ("asimd", "asimddp", "bf16", "i8mm", "sve")


def cuda() -> Platform | None:
    """NVIDIA, by torch's CUDA build."""
    return None if torch.version.hip else _cuda_like("cuda")


def rocm() -> Platform | None:
    """AMD, which torch drives through the same API."""
    return _cuda_like("rocm") if torch.version.hip else None


def _cuda_like(name: str) -> Platform | None:
    if not torch.cuda.is_available():
        return None
    devices = tuple(_cuda_device(index) for index in range(torch.cuda.device_count()))
    low_precision: tuple[str, ...] = ("bfloat16",) if torch.cuda.is_bf16_supported() else ()
    if _multiplies_float8(name, devices[0].capability):
        low_precision += ("float8_e4m3fn",)
    return Platform(
        name=name,
        device_type="cuda",
        devices=devices,
        dtypes=(*FLOATS, "float64", *low_precision),
        collective_backend="nccl",
        graph_capture=True,
        num_threads=torch.get_num_threads(),
    )


def _multiplies_float8(name: str, capability: str) -> bool:
    """Ada and Hopper do, and what came after; of AMD's MI300 (in its own form), MI350 and RDNA 4."""
    if name == "rocm":
        return capability.startswith(AMD_FLOAT8)
    return tuple(map(int, capability.split("."))) >= (8, 9)


def _cuda_device(index: int) -> DeviceFacts:
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = str(getattr(about, "gcnArchName", "")) or "{}.{}".format(*torch.cuda.get_device_capability(index))
    return DeviceFacts(index=index, name=about.name, memory_total=total, memory_free=free, capability=capability)


def xpu() -> Platform | None:
    """Intel GPUs."""
    if not torch.xpu.is_available():
        return None
    devices = []
    for index in range(torch.xpu.device_count()):
        about = torch.xpu.get_device_properties(index)
        total = int(about.total_memory)
        free = total - torch.xpu.memory_reserved(index)
        devices.append(DeviceFacts(index=index, name=about.name, memory_total=total, memory_free=free))
    return Platform(
        name="xpu",
        device_type="xpu",
        devices=tuple(devices),
        dtypes=(*FLOATS, "bfloat16"),
        collective_backend="xccl",
        graph_capture=False,
        num_threads=torch.get_num_threads(),
    )


def mps() -> Platform | None:
    """Apple GPUs, which share the machine's memory."""
    if not torch.backends.mps.is_available():
        return None
    total, free = _memory()
    device = DeviceFacts(index=0, name=host.processor() or "Apple GPU", memory_total=total, memory_free=free)
    return Platform(
        name="mps",
        device_type="mps",
        devices=(device,),
        dtypes=(*FLOATS, "bfloat16"),
        collective_backend="gloo",
        graph_capture=False,
        num_threads=torch.get_num_threads(),
    )


def cpu() -> Platform:
    """Always there."""
    total, free = _memory()
    name, flags = _processor()
    device = DeviceFacts(index=0, name=name, memory_total=total, memory_free=free)
    return Platform(
        name="cpu",
        device_type="cpu",
        devices=(device,),
        dtypes=("float32", "float64", "bfloat16", "float16"),
        collective_backend="gloo",
        graph_capture=False,
        isa=tuple(flag for flag in (*X86_FLAGS, *ARM_FLAGS) if flag in flags),
        num_threads=torch.get_num_threads(),
    )


def _memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return total, int(available) * 1024
    except (OSError, StopIteration, ValueError):
        return total, total // 2


def _processor() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return host.processor() or host.machine(), frozenset()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = facts.get("flags", facts.get("Features", ""))
    return facts.get("model name", host.machine()), frozenset(flags.split())


QUERIES: dict[str, Callable[[], Platform | None]] = {"cuda": cuda, "rocm": rocm, "xpu": xpu, "mps": mps, "cpu": cpu}
