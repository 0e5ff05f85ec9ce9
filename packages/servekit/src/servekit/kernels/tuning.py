"""How a kernel is launched on the device at hand: what `servekit tune` measured there, or else a safe default.

Nothing is tried while requests are served. A file is ``{"device": name, "configs": {kernel: [{"shape": {...},
"config": {...}}]}, "libraries": {kernel: name}}``, the last for kernels that another library was measured to have
faster. Those that come with the package lie in ``tuned/``, an operator's own in the folder that ``SERVEKIT_TUNED``
names, which wins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from common_platform.errors import ConfigError

VARIABLE = "SERVEKIT_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
LIBRARIES = ("flashinfer",)
LIMITS = {"block_n": 256, "block_k": 256, "block_m": 256, "num_warps": 16, "num_stages": 8}
Shape = dict[str, int]
Items = tuple[tuple[str, int], ...]  # of a shape, sorted


@dataclass(frozen=True, slots=True)
class Tuned:
    """The parts of a launch that do not change what is computed; 0 where a kernel has no such part."""

    block_n: int = 0
    num_warps: int = 4
    num_stages: int = 2
    block_m: int = 0
    block_k: int = 0


_tried: dict[tuple[str, Items], dict[str, int]] = {}  # only while `servekit tune` measures


@contextmanager
def trying(kernel: str, shape: Shape, config: dict[str, int]) -> Iterator[None]:
    """Launch ``kernel`` with this ``shape`` as ``config`` says, else by default, whatever is known of this device."""
    key = kernel, tuple(sorted(shape.items()))
    _tried[key] = config
    try:
        yield
    finally:
        del _tried[key]


def tuned(kernel: str, default: Tuned, **shape: int) -> Tuned:
    """The measured configuration for this shape on this device, else ``default``."""
    items = tuple(sorted(shape.items()))
    tried = _tried.get((kernel, items)) if _tried else None
    return _found(kernel, default, items, device_name()) if tried is None else replace(default, **tried)


@lru_cache(maxsize=4096)
def _found(kernel: str, default: Tuned, shape: Items, device: str) -> Tuned:
    for entry in measured_on(device).configs.get(kernel, []):
        if entry["shape"] == dict(shape):
            return replace(default, **entry["config"])
    return default


def bucket(number: int) -> int:
    """The power of four, up to 65536, that stands for ``number`` of tokens or pairs in a shape: the next one."""
    return min(1 << 2 * ((number - 1).bit_length() + 1 >> 1), 65536) if number > 1 else 1


@lru_cache(maxsize=1)
def device_name() -> str:
    """The first GPU's name, ``cpu`` where there is none."""
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            return str(kind.get_device_name(0))
    return "cpu"


def stages(wanted: int) -> int:
    """How many loads a loop keeps under way: AMD's compiler does best with two, whose shared memory is small."""
    return min(wanted, 2) if torch.version.hip else wanted


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a file says: entries by kernel, and the library that has a kernel faster than we do."""

    configs: dict[str, list[dict[str, Any]]]
    libraries: dict[str, str]


def library_of(kernel: str) -> str | None:
    """The library that was measured on this device to have ``kernel`` faster; None for our own."""
    return measured_on(device_name()).libraries.get(kernel)


@lru_cache(maxsize=8)
def measured_on(device: str) -> Measured:
    """All that is known of ``device``, which may be nothing.

    Raises:
        ConfigError: a file is not what ``write`` writes.
    """
    own = os.environ.get(VARIABLE)
    for folder in ([Path(own)] if own else []) + [SHIPPED]:
        path = folder / file_name(device)
        if path.is_file():
            return _read(path)
    return Measured({}, {})


def _read(path: Path) -> Measured:
    try:
        body = json.loads(path.read_text())
        configs = {str(kernel): [_entry(path, one) for one in entries] for kernel, entries in body["configs"].items()}
        libraries = {str(kernel): str(name) for kernel, name in body.get("libraries", {}).items()}
        for kernel, name in libraries.items():
            if name not in LIBRARIES:
                raise ConfigError(f"{path}: {kernel}", name, f"one of {', '.join(LIBRARIES)}")
        return Measured(configs, libraries)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(VARIABLE, str(path), f"a file that servekit tune wrote ({type(error).__name__})") from error


def _entry(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    config, known = dict(entry["config"]), {field.name for field in fields(Tuned)}
    for name, value in config.items():
        powers = name == "num_stages" or (isinstance(value, int) and value & (value - 1) == 0)
        if name not in known or not isinstance(value, int) or not 0 < value <= LIMITS[name] or not powers:
            raise ConfigError(f"{path}: {name}", value, f"one of {sorted(known)}, a power of two, at most {LIMITS}")
    return {"shape": {str(key): int(value) for key, value in entry["shape"].items()}, "config": config}


def write(
    folder: Path,
    device: str,
    configs: dict[str, list[dict[str, Any]]],
    libraries: Mapping[str, str | None] = MappingProxyType({}),
) -> Path:
    """Write what was measured on ``device``; what a file there says of other kernels and shapes stays.

    Args:
        libraries: the library that has a kernel faster, or None for those that we have.
    """
    path = folder / file_name(device)
    known = _read(path) if path.is_file() else Measured({}, {})
    for kernel, entries in configs.items():
        shapes = [entry["shape"] for entry in entries]
        others = [entry for entry in known.configs.get(kernel, []) if entry["shape"] not in shapes]
        known.configs[kernel] = others + entries
    faster = {kernel: name for kernel, name in (known.libraries | dict(libraries)).items() if name}
    folder.mkdir(parents=True, exist_ok=True)
    body = {"device": device, "configs": known.configs, "libraries": faster}
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return path
