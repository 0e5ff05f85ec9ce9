"""How a kernel is launched on the device at hand: what `servekit tune` measured there, or else a safe default.

Nothing is tried while requests are served. A file is ``{"device": name, "configs": {kernel: [{"shape": {...},
"config": {...}}]}}``; those that come with the package lie in ``tuned/``, an operator's own in the folder that
``SERVEKIT_TUNED`` names, which wins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from common_platform.errors import ConfigError

VARIABLE = "SERVEKIT_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
LIMITS = {"block_n": 256, "block_k": 256, "block_m": 256, "num_warps": 16, "num_stages": 8}
Shape = dict[str, int]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The parts of a launch that do not change what is computed; 0 where a kernel has no such part."""

    block_n: int = 0
    num_warps: int = 4
    num_stages: int = 2
    block_m: int = 0
    block_k: int = 0


_tried: dict[str, dict[str, int]] = {}  # only while `servekit tune` measures


@contextmanager
def trying(kernel: str, config: dict[str, int]) -> Iterator[None]:
    """Launch ``kernel`` as ``config`` says, whatever is known of this device."""
    _tried[kernel] = config
    try:
        yield
    finally:
        del _tried[kernel]


def tuned(kernel: str, default: Tuned, **shape: int) -> Tuned:
    """The measured configuration for this shape on this device, else ``default``."""
    if kernel in _tried:
        return replace(default, **_tried[kernel])
    return _found(kernel, default, tuple(sorted(shape.items())), device_name())


@lru_cache(maxsize=4096)
def _found(kernel: str, default: Tuned, shape: tuple[tuple[str, int], ...], device: str) -> Tuned:
    for entry in configs_of(device).get(kernel, []):
        if entry["shape"] == dict(shape):
            return replace(default, **entry["config"])
    return default


@lru_cache(maxsize=1)
def device_name() -> str:
    """The first GPU's name, ``cpu`` where there is none."""
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


def stages(wanted: int) -> int:
    """How many loads a loop keeps under way: AMD's compiler does best with two, whose shared memory is small."""
    return min(wanted, 2) if torch.version.hip else wanted


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@lru_cache(maxsize=8)
def configs_of(device: str) -> dict[str, list[dict[str, Any]]]:
    """All that is known of ``device``: kernel -> entries; empty where nothing is.

    Raises:
        ConfigError: a file is not what ``write`` writes.
    """
    own = os.environ.get(VARIABLE)
    for folder in ([Path(own)] if own else []) + [SHIPPED]:
        path = folder / file_name(device)
        if path.is_file():
            return _read(path)
    return {}


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        body = json.loads(path.read_text())
        return {str(kernel): [_entry(path, one) for one in entries] for kernel, entries in body["configs"].items()}
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


def write(folder: Path, device: str, configs: dict[str, list[dict[str, Any]]]) -> Path:
    """Write what was measured on ``device``; what a file there says of other kernels and shapes stays."""
    path = folder / file_name(device)
    kept = _read(path) if path.is_file() else {}
    for kernel, entries in configs.items():
        shapes = [entry["shape"] for entry in entries]
        kept[kernel] = [entry for entry in kept.get(kernel, []) if entry["shape"] not in shapes] + entries
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "configs": kept}, indent=1, sort_keys=True) + "\n")
    return path
