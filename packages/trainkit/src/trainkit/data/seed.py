"""Seeds, and the state of all random number generators as plain data."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

from common_platform.errors import ConfigError


def seed_everything(seed: int = 0, *, workers: bool = False) -> int:
    """Seed Python, NumPy and torch on all devices.

    Args:
        seed: 0..2**32 - 1.
        workers: also tell data-loader workers, by the environment variable ``PL_SEED_WORKERS`` of Lightning.

    Raises:
        ConfigError: ``seed`` is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError("seed", seed, "0..4294967295")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    return seed


def rng_state() -> dict[str, Any]:
    """The state of every generator: numbers, lists and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
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
