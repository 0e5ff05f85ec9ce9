"""Learning-rate schedules: a warmup, then whatever follows. All are torch schedulers and resume exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

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
    if decay not in DECAYS:
        raise ConfigError("decay", decay, f"one of {tuple(DECAYS)}")
    if not 0 <= warmup_steps <= total_steps or total_steps < 1:
        raise ConfigError("warmup_steps", warmup_steps, f"0..total_steps={total_steps}")

    def after(step: int) -> float:
        done = min(step / max(total_steps - warmup_steps, 1), 1.0)
        return min_factor + (1 - min_factor) * DECAYS[decay](done)

    return _after_warmup(optimizer, warmup_steps, warmup, after)


def inverse_sqrt_schedule(optimizer: Optimizer, *, warmup_steps: int, warmup: str = "linear") -> LambdaLR:
    """After the warmup the rate falls with the square root of the steps: after four warmups it is the half.

    Source: Vaswani et al., "Attention Is All You Need", NIPS 2017.
    """
    if warmup_steps < 1:
        raise ConfigError("warmup_steps", warmup_steps, "1 or more: the decay is counted in it")
    return _after_warmup(optimizer, warmup_steps, warmup, lambda step: (warmup_steps / (warmup_steps + step)) ** 0.5)


def wsd_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    warmup: str = "linear",
    decay: str = "linear",
    min_factor: float = 0.0,
) -> LambdaLR:
    """Warmup, then the full rate, then a decay: training can go on from the end of the stable part.

    Source: Hu et al., "MiniCPM", COLM 2024.
    """
    if decay not in DECAYS:
        raise ConfigError("decay", decay, f"one of {tuple(DECAYS)}")
    if stable_steps < 0 or decay_steps < 1:
        raise ConfigError("decay_steps", decay_steps, f"1 or more, and stable_steps={stable_steps} 0 or more")

    def after(step: int) -> float:
        done = min(max(step - stable_steps, 0) / decay_steps, 1.0)
        return min_factor + (1 - min_factor) * DECAYS[decay](done)

    return _after_warmup(optimizer, warmup_steps, warmup, after)


def cosine_restarts_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    cycle_steps: int,
    growth: float = 1.0,
    warmup: str = "linear",
    min_factor: float = 0.0,
) -> LambdaLR:
    """After the warmup cosines from the full rate to ``min_factor`` of it, each ``growth`` times as long as the last.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017.
    """
    if cycle_steps < 1 or growth < 1:
        raise ConfigError("cycle_steps", cycle_steps, f"1 or more, and growth={growth} 1 or more")

    def after(step: int) -> float:
        length = float(cycle_steps)
        left = float(step)
        while left >= length:
            left, length = left - length, length * growth
        return min_factor + (1 - min_factor) * DECAYS["cosine"](left / length)

    return _after_warmup(optimizer, warmup_steps, warmup, after)


class WarmupThen:
    """A warmup, and then any scheduler of torch: each group's rate rises to its own over ``warmup_steps`` steps.

    For ``ReduceLROnPlateau`` give both, this with ``after=None`` per step and the other per epoch.

    Args:
        after: a scheduler of the same optimizer, or None for a constant rate. It must not have made a step.
        warmup: one of ``WARMUPS``.

    Raises:
        ConfigError: an unknown shape, a number below 0, or a scheduler that wants a metric.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_steps: int, after: LRScheduler | None = None, warmup: str = "linear"
    ) -> None:
        _check_warmup(warmup_steps, warmup)
        if isinstance(after, ReduceLROnPlateau):
            raise ConfigError("after", "ReduceLROnPlateau", "None, and the plateau as a scheduler of its own")
        self.optimizer, self.warmup_steps, self.after = optimizer, warmup_steps, after
        self._shape = WARMUPS[warmup]
        self._full = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0  # steps made, by torch's word
        self._set()

    def _set(self) -> None:
        factor = self._shape((self.last_epoch + 1) / self.warmup_steps) if self.last_epoch < self.warmup_steps else 1.0
        for group, full in zip(self.optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * factor

    def step(self) -> None:
        self.last_epoch += 1
        if self.last_epoch <= self.warmup_steps:
            self._set()
        elif self.after is not None:
            self.after.step()

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        after = self.after.state_dict() if self.after is not None else {}
        kept = {key: value for key, value in after.items() if not callable(value)}
        return {"last_epoch": self.last_epoch, "full": list(self._full), "after": kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.last_epoch, self._full = state_dict["last_epoch"], list(state_dict["full"])
        if self.after is not None:
            self.after.load_state_dict(dict(state_dict["after"]))


def _after_warmup(optimizer: Optimizer, warmup_steps: int, warmup: str, after: Callable[[int], float]) -> LambdaLR:
    """A warmup, then ``after``: steps since the warmup -> factor."""
    _check_warmup(warmup_steps, warmup)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return WARMUPS[warmup]((step + 1) / warmup_steps)
        return after(step - warmup_steps)

    return LambdaLR(optimizer, factor)


def _check_warmup(warmup_steps: int, warmup: str) -> None:
    if warmup not in WARMUPS:
        raise ConfigError("warmup", warmup, f"one of {tuple(WARMUPS)}")
    if warmup_steps < 0:
        raise ConfigError("warmup_steps", warmup_steps, "0 or more")
