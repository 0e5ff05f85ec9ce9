"""The states of torchmetrics inside a module, which its own ``state_dict`` leaves out, for resuming in mid-epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def is_metric(value: Any) -> bool:
    """Whether ``value`` is a metric of torchmetrics, without importing it."""
    return all(hasattr(value, name) for name in ("compute", "reset", "update", "metric_state"))


def metric_states(module: nn.Module) -> dict[str, Any]:
    """Each metric's state, by its name in ``module``: tensors, lists of tensors, and how often it was updated."""
    return {
        name: {"values": dict(metric.metric_state), "updates": metric._update_count}
        for name, metric in module.named_modules()
        if is_metric(metric) and metric._update_count
    }


def load_metric_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Put back what ``metric_states`` found."""
    there = dict(module.named_modules())
    for name, state in states.items():
        metric: Any = there.get(name)
        if metric is not None and is_metric(metric):
            for key, value in state["values"].items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = state["updates"], None


def name_of(module: nn.Module, metric: Any) -> str | None:
    """The name of ``metric`` in ``module``."""
    return next((name for name, one in module.named_modules() if one is metric), None)
