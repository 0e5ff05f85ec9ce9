"""Compile a kernel to the binary of a device that need not be here, and say what the binary takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common_platform.errors import ConfigError
from common_platform.kernels.specialization import TARGETS, Specialization
from common_platform.kernels.where import VARIABLE, is_interpreted

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What one block of threads takes."""

    registers: int  # a thread; on AMD vector registers, accumulation registers included
    spills: int  # bytes of a thread's own memory
    shared: int  # bytes
    binary: int  # bytes


def compile_for(specialization: Specialization, target_name: str) -> Compiled:
    """The binary of ``specialization`` for one of ``TARGETS``; triton caches it.

    Raises:
        ConfigError: kernels are interpreted in this process, so there is nothing to compile.
        triton.CompilationError: the kernel is not valid for that target.
    """
    if is_interpreted():
        raise ConfigError(VARIABLE, 1, "unset where kernels are compiled")
    target = TARGETS[target_name]
    stages, warps = specialization.num_stages, specialization.num_warps
    if target.backend != "cuda":
        stages, warps = specialization.amd_stages, specialization.amd_warps or warps
    built = triton.compile(
        _source(specialization, target.float8),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": warps, "num_stages": stages},
    )
    if target.backend == "cuda":
        registers, spills = _nvidia(built.asm["cubin"])
        binary = len(built.asm["cubin"])
    else:
        registers, spills = _amd(built.asm["amdgcn"])
        binary = len(built.asm["hsaco"])
    return Compiled(registers=registers, spills=spills, shared=int(built.metadata.shared), binary=binary)


def _source(specialization: Specialization, float8: str) -> Any:
    kernel = specialization.kernel
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in specialization.constants:
            signature[name] = "constexpr"
            continue
        if name not in specialization.signature:
            raise ConfigError(f"{specialization.title}: {name}", "missing", "in signature or in constants")
        kind, _, multiple = specialization.signature[name].partition(":")
        signature[name] = kind.replace("fp8e4nv", float8)
        if multiple == "16" or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    unknown = set(specialization.signature) | set(specialization.constants)
    unknown -= set(kernel.arg_names)
    if unknown:
        raise ConfigError(f"{specialization.title}: arguments", sorted(unknown), f"of {kernel.arg_names}")
    return ASTSource(kernel, signature=signature, constexprs=dict(specialization.constants), attrs=attributes)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory, which is where spills go, by the tool that triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    if found is None:
        raise ConfigError("cuobjdump", told[:200], "a line with REG, STACK and LOCAL")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def _amd(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory; scalar registers spill to vector registers, which costs little."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size")
