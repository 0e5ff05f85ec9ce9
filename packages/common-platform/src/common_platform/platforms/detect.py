"""Which platform this machine has: CUDA, ROCm, XPU, MPS, CPU, in that order, after the plugins."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points

from common_platform.errors import ConfigError, DeviceError
from common_platform.platforms.platform import Platform
from common_platform.platforms.queries import QUERIES

VARIABLE = "COMMON_PLATFORM"
GROUP = "common_platform.platforms"  # entry points: functions that return a Platform, or None
Query = Callable[[], Platform | None]


def detect(name: str | None = None) -> Platform:
    """The platform to use.

    Args:
        name: the one that must be used; default: the environment variable ``COMMON_PLATFORM``, else the best found.

    Raises:
        ConfigError: no platform has that name.
        DeviceError: it was asked for by name and is not here.

    A driver that breaks while it is asked is written down in ``found`` and passed over.
    """
    queries = _queries()
    wanted = name or os.environ.get(VARIABLE)
    if wanted:
        return _forced(wanted, queries)
    found: list[str] = []
    for kind, query in queries.items():
        platform = _ask(kind, query, found)
        if platform is not None:
            return replace(platform, found=tuple(found))
    raise DeviceError("platform", "none", "a machine with at least a CPU")


def _queries() -> dict[str, Query]:
    plugins = {entry.name: pkgutil.resolve_name(entry.value) for entry in entry_points(group=GROUP)}
    return plugins | QUERIES


def _forced(name: str, queries: dict[str, Query]) -> Platform:
    if name not in queries:
        raise ConfigError(VARIABLE, name, f"one of {', '.join(queries)}")
    found: list[str] = []
    platform = _ask(name, queries[name], found)
    if platform is None:
        raise DeviceError(VARIABLE, name, f"a device that is here ({found[-1]})")
    return replace(platform, found=tuple(found))


def _ask(kind: str, query: Query, found: list[str]) -> Platform | None:
    try:
        platform = query()
    except Exception as error:  # noqa: BLE001 - a broken driver must not take the CPU away; it is said in `found`
        found.append(f"{kind}: the driver failed ({type(error).__name__}: {str(error)[:120]})")
        return None
    if platform is None:
        found.append(f"{kind}: not here")
        return None
    found.append(f"{kind}: {len(platform.devices)} x {platform.devices[0].name}")
    return platform
