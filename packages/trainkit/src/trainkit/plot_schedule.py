"""A picture of a schedule, before a run is spent on it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common_platform.errors import ConfigError, ResourceError


def schedule_rates(make: Callable[[Optimizer], Any], steps: int, lr: float = 1.0) -> list[float]:
    """The learning rate of each of ``steps`` steps under the scheduler that ``make`` makes.

    Raises:
        ConfigError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ConfigError("steps", steps, "1 or more")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def plot_schedule(make: Callable[[Optimizer], Any], steps: int, path: str | Path, lr: float = 1.0) -> list[float]:
    """Draw the learning rate over ``steps`` steps as PNG or SVG, by the ending of ``path``; the rates.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    part = matplotlib_part("figure", "plot_schedule")
    rates = schedule_rates(make, steps, lr)
    figure = part.Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(steps), rates)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return rates


def matplotlib_part(name: str, needed_by: str) -> Any:
    """The module ``matplotlib.name``.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ResourceError(needed_by, "matplotlib", "installed: pip install 'trainkit[plot]'")
    return import_module(f"matplotlib.{name}")
