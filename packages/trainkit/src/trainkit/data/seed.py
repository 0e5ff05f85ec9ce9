"""Seeds, and the state of all random number generators as plain data."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

from common_platform.errors import ConfigError


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python, NumPy and torch on all devices.

    Args:
        seed: 0..2**32 - 1; None: that of the environment variable ``PL_GLOBAL_SEED``, else 0.
        workers: also tell data-loader workers, by the environment variable ``PL_SEED_WORKERS`` of Lightning.
        verbose: taken for Lightning's sake; nothing is printed.

    Raises:
        ConfigError: ``seed`` is no number, or out of range.
    """
    given = os.environ.get("PL_GLOBAL_SEED", "0") if seed is None else seed
    try:
        number = int(given)
    except (TypeError, ValueError) as error:
        raise ConfigError("seed", given, "a number, 0..4294967295") from error
    if isinstance(given, bool | float) or not 0 <= number < 2**32:
        raise ConfigError("seed", given, "0..4294967295")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    os.environ["PL_GLOBAL_SEED"] = str(number)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    return number


Raw = tuple[Any, Any, Any]


def raw_rng_state() -> Raw:
    """The state of Python's, NumPy's and torch's generator as they give it, for ``rng_state``; takes microseconds."""
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()


def rng_state(raw: Raw | None = None) -> dict[str, Any]:
    """The state of every generator: numbers, lists and tensors; or ``raw`` in that form, without devices."""
    (version, words, gauss), (kind, keys, position, has_gauss, cached), of_torch = raw or raw_rng_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": of_torch,
    }
    if raw is None and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator where ``rng_state`` found it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
