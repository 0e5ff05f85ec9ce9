"""The facts of a platform. Code asks for the fact that it needs, never for the name of the device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """One device."""

    index: int
    name: str
    memory_total: int  # bytes
    memory_free: int  # bytes, when it was asked
    capability: str = ""  # "9.0", "gfx942", ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What the chosen kind of device can do."""

    name: str  # cuda | rocm | xpu | mps | cpu, or a plugin's
    device_type: str  # torch's word
    devices: tuple[DeviceFacts, ...]
    dtypes: tuple[str, ...]  # that it computes in
    collective_backend: str  # nccl (also RCCL) | xccl | gloo
    graph_capture: bool  # whether a sequence of kernels can be recorded and replayed
    isa: tuple[str, ...] = ()  # of a CPU
    num_threads: int = 1
    found: tuple[str, ...] = ()  # what detection said, kind by kind

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
