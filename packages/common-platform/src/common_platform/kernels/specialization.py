"""One way in which a Triton kernel is compiled, written down so that it can be tried without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to compile for."""

    backend: str  # triton's word: cuda | hip
    arch: int | str
    warp_size: int  # threads
    shared_limit: int  # bytes of shared memory that one block of threads may have
    supports: frozenset[str] = frozenset()  # the fp8 types of triton that it computes with
    float8: str = "fp8e4nv"  # the one of four exponent bits that it multiplies


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp_size=32, shared_limit=163 * KIB, supports=frozenset({"fp8e5"})),
    "sm_90": Target(
        backend="cuda", arch=90, warp_size=32, shared_limit=227 * KIB, supports=frozenset({"fp8e5", "fp8e4nv"})
    ),
    "sm_100": Target(
        backend="cuda", arch=100, warp_size=32, shared_limit=227 * KIB, supports=frozenset({"fp8e5", "fp8e4nv"})
    ),
    "gfx942": Target(
        backend="hip",
        arch="gfx942",
        warp_size=64,
        shared_limit=64 * KIB,
        supports=frozenset({"fp8e4b8", "fp8e4nv"}),
        float8="fp8e4b8",
    ),
    "gfx950": Target(
        backend="hip", arch="gfx950", warp_size=64, shared_limit=160 * KIB, supports=frozenset({"fp8e5", "fp8e4nv"})
    ),
}
NVIDIA_FP8 = ("sm_90", "sm_100", "gfx942", "gfx950")  # have fp8e4nv


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialization:
    """What a launcher passes to a kernel.

    ``kernel``: the ``triton.jit`` function. ``signature``: its arguments that are not constants, as triton writes
    types: ``*bf16`` a pointer (16-byte aligned), ``i32``, ``fp32``; ``i32:16`` is a multiple of 16, and ``*fp8e4nv``
    stands for the float8 of each target. ``constants``: its
    ``tl.constexpr`` arguments, all of them. An argument that is None in the launch is a constant None. ``targets``: of
    ``TARGETS``. ``amd_stages``: ``num_stages`` for AMD's targets, whose shared memory is smaller;
    ``amd_warps``: ``num_warps`` for them where it is another, for a warp of theirs has 64 threads.
    """

    kernel: Any
    name: str  # what it is for: "bf16, head_dim 128"
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    amd_stages: int = 2
    amd_warps: int | None = None
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def title(self) -> str:
        return f"{self.kernel.__name__.strip('_')} ({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call must move and compute at the least, for the first timing on a GPU to be judged by.

    ``bytes``: read and written, each once. ``flops``: two a multiply-add. ``bound``: which of the two decides.
    ``target``: the share of that bound which we want.
    """

    operation: str
    shape: str
    bytes: int
    flops: int
    bound: str  # bandwidth | tensor cores
    target: float
