"""How many worker processes a loader should have."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from common_platform.errors import ConfigError
from trainkit.data.loaders import rebuilt

MOST = 8  # more rarely help, and each holds a copy of what it touches
ENOUGH = 1.1  # more workers must be this much faster to be worth their memory


def usable_cores() -> int:
    """Of this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def suggested_num_workers(ranks_here: int | None = None) -> int:
    """A guess without measuring: this rank's share of the cores but one, at most 8.

    Args:
        ranks_here: ranks on this machine; default: what torchrun says, else 1.
    """
    ranks = ranks_here or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(usable_cores() // ranks - 1, 0), MOST)


def measured_num_workers(
    loader: DataLoader[Any],
    candidates: Sequence[int] | None = None,
    *,
    num_batches: int = 50,
    seconds: float = 5.0,
) -> tuple[int, dict[int, float]]:
    """The number of workers with which ``loader`` gives batches fastest; the smallest of those that are about as fast.

    Args:
        candidates: default 0, 1, 2, 4 and so on up to this rank's cores.
        num_batches, seconds: of each measurement, whichever comes first; the start of the workers is not counted.

    Returns:
        The number, and batches a second by number.

    Raises:
        ConfigError: ``loader`` is no plain ``DataLoader``, or gives no batches.
    """
    if type(loader) is not DataLoader:
        raise ConfigError("loader", type(loader).__name__, "a torch DataLoader")
    rates: dict[int, float] = {}
    for count in sorted(set(_powers_of_two() if candidates is None else candidates)):
        rates[count] = _batches_a_second(rebuilt(loader, num_workers=count), num_batches, seconds)
    best = max(rates.values())
    return min(count for count, rate in rates.items() if rate * ENOUGH >= best), rates


def _powers_of_two() -> list[int]:
    most = suggested_num_workers() + 1
    return [0, *(2**n for n in range(most.bit_length()) if 2**n <= most)]


def _batches_a_second(loader: DataLoader[Any], num_batches: int, seconds: float) -> float:
    batches = iter(loader)
    if next(batches, None) is None:
        raise ConfigError("loader", "0 batches", "one or more")
    began = time.perf_counter()
    count = 0
    for _ in islice(batches, num_batches):
        count += 1
        if time.perf_counter() - began >= seconds:
            break
    return max(count, 1) / max(time.perf_counter() - began, 1e-9)
