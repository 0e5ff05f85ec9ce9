"""Learning-rate schedules: a warmup, then whatever follows. All are torch schedulers and resume exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common_platform.errors import ConfigError

Shape = Callable[[float], float]
WARMUPS: dict[str, Shape] = {  # share of the warmup done, (0, 1] -> factor
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "exponential": lambda done: math.exp(5 * (done - 1)),
    "constant": lambda done: 0.1 if done < 1 else 1.0,
}
DECAYS: dict[str, Shape] = {  # share of the decay done, [0, 1] -> factor, 1 to 0
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def warmup_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    warmup: str = "linear",
    decay: str = "linear",
    min_factor: float = 0.0,
) -> LambdaLR:
    """Each group's learning rate rises over ``warmup_steps`` steps and falls until ``total_steps``.

    Args:
        warmup: one of ``WARMUPS``; the first step already has 1 / warmup_steps of the rate.
        decay: one of ``DECAYS``.
        min_factor: where the decay ends, as a share of the full rate.

    Raises:
        ConfigError: an unknown shape, or a warmup longer than the whole.
    """
    if warmup not in WARMUPS:
        raise ConfigError("warmup", warmup, f"one of {tuple(WARMUPS)}")
    if decay not in DECAYS:
        raise ConfigError("decay", decay, f"one of {tuple(DECAYS)}")
    if not 0 <= warmup_steps <= total_steps or total_steps < 1:
        raise ConfigError("warmup_steps", warmup_steps, f"0..total_steps={total_steps}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return WARMUPS[warmup]((step + 1) / warmup_steps)
        done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return min_factor + (1 - min_factor) * DECAYS[decay](done)

    return LambdaLR(optimizer, factor)
