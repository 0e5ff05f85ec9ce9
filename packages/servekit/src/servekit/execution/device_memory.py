"""How much memory a device has for keys and values: what a run of the largest step leaves of the share allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from common_platform.errors import ConfigError

GRAPH_BYTES = 256 << 20  # kept for recorded graphs and libraries' workspaces
DEFAULT_UTILIZATION = 0.9


class DeviceMemory(Protocol):
    """What the driver and torch's allocator say of a device, in bytes."""

    def total(self) -> int: ...

    def free(self) -> int:
        """As the driver has it: others' memory is not free."""

    def allocated(self) -> int:
        """By torch, now."""

    def peak(self) -> int:
        """The most that was allocated by torch since ``reset_peak``."""

    def reset_peak(self) -> None: ...


class TorchMemory:
    """Of one device whose allocator torch has: CUDA, ROCm, XPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch: Any = getattr(torch, device.type)

    def total(self) -> int:
        return int(self._torch.mem_get_info(self._device)[1])

    def free(self) -> int:
        self._torch.empty_cache()
        return int(self._torch.mem_get_info(self._device)[0])

    def allocated(self) -> int:
        return int(self._torch.memory_allocated(self._device))

    def peak(self) -> int:
        self._torch.synchronize(self._device)
        return int(self._torch.max_memory_allocated(self._device))

    def reset_peak(self) -> None:
        self._torch.reset_peak_memory_stats(self._device)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile:
    """What was found, in bytes; shown at the start and kept for those who ask why."""

    total: int
    used_before: int  # by the weights and by everybody else
    step: int  # that the largest step takes beside
    for_cache: int


def profile_memory(
    memory: DeviceMemory, largest_step: Callable[[], None], utilization: float, reserve: int = GRAPH_BYTES
) -> MemoryProfile:
    """Run ``largest_step`` and tell what is left for the cache.

    Args:
        utilization: share of the device's whole memory that this process and all others may take together.
        reserve: bytes for what comes after: recorded graphs.

    Raises:
        ConfigError: nothing is left.
    """
    memory.reset_peak()
    before = memory.allocated()
    largest_step()
    step = memory.peak() - before
    total = memory.total()
    used = total - memory.free()
    left = int(total * utilization) - used - step - reserve
    if left <= 0:
        raise ConfigError(
            "gpu_memory_utilization",
            utilization,
            f"more than {(used + step + reserve) / total:.3f}: weights and others take {used} bytes of {total}, a step "
            f"{step}, graphs {reserve}",
            flag="--gpu-memory-utilization or --max-num-batched-tokens",
        )
    return MemoryProfile(total=total, used_before=used, step=step, for_cache=left)
