"""What would be compiled for each launch of an interpreted kernel: Triton's own rule, asked without a device.

A kernel is compiled anew for other types, constants, a number that is 1 or a multiple of 16, a pointer that is not
aligned. The interpreter compiles nothing, but it is given the same arguments.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import interpreter
from triton.runtime.jit import native_specialize_impl

from common_platform.kernels import Specialization

STEADY = ("do_not_specialize", "do_not_specialize_on_alignment")
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True, slots=True)
class Variant:
    """``arguments``: the name, the type (``constexpr`` for what is compiled in) and the specialization of each."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, str, Any], ...]
    options: tuple[tuple[str, int], ...]


@contextmanager
def variants() -> Iterator[set[Variant]]:
    """Those launched meanwhile in this process, which has to be an interpreting one."""
    found: set[Variant] = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    given = interpreter.InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found.add(_variant(self, backend, args, kwargs))
        return given(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = run
    try:
        yield found
    finally:
        interpreter.InterpretedFunction.run = given


def _variant(kernel: Any, backend: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    passed = dict(zip(kernel.arg_names, args, strict=False))
    passed |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    steady, unaligned = (set(kernel.kwargs.get(key) or ()) for key in STEADY)
    constants = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    arguments = []
    for name in kernel.arg_names:
        value = passed[name]
        if name in constants:
            value = value.value if isinstance(value, tl.constexpr) else value
            arguments.append((name, "constexpr", value))
            continue
        kind, special = native_specialize_impl(backend, value, False, name not in steady, name not in unaligned)
        arguments.append((name, kind, special))
    options = tuple((name, kwargs[name]) for name in OPTIONS if name in kwargs)
    return Variant(kernel.fn.__module__, kernel.fn.__name__, tuple(arguments), options)


def write(found: set[Variant], path: Path) -> None:
    """A line a variant; types among the constants by their names."""
    lines = []
    for one in found:
        arguments = [(name, kind, _plain(special)) for name, kind, special in one.arguments]
        lines.append(json.dumps([one.module, one.kernel, arguments, one.options]))
    path.write_text("".join(f"{line}\n" for line in sorted(lines)))


def read(paths: Iterable[Path]) -> list[Variant]:
    """Each once, in one order."""
    lines = {line for path in paths for line in path.read_text().splitlines()}
    found = []
    for line in sorted(lines):
        module, kernel, arguments, options = json.loads(line)
        given = tuple((name, kind, _typed(special)) for name, kind, special in arguments)
        found.append(Variant(module, kernel, given, tuple((name, value) for name, value in options)))
    return found


def _plain(special: Any) -> Any:
    return {"dtype": str(special)} if isinstance(special, tl.dtype) else special


def _typed(special: Any) -> Any:
    return tl.dtype(special["dtype"]) if isinstance(special, dict) else special


def specialization_of(variant: Variant) -> Specialization:
    """How it is compiled; what the interpreter was given as float16 stands for bfloat16, which serves on devices."""
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    constants = {name: value for name, kind, value in variant.arguments if kind == "constexpr"}
    signature = {
        name: kind.replace("fp16", "bf16") + (":16" if special == "D" and kind.startswith("i") else "")
        for name, kind, special in variant.arguments
        if kind != "constexpr"
    }
    options = dict(variant.options)
    return Specialization(
        kernel=kernel,
        name=str({name: value for name, value in constants.items() if value is not None}),
        signature=signature,
        constants=constants,
        num_warps=options.get("num_warps", 4),
        num_stages=options.get("num_stages", 2),
        amd_stages=min(options.get("num_stages", 2), 2),
    )
