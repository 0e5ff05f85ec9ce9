"""Micro-batches whose gradients are added up to one optimizer step, averaged exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import TrainingError


class Group:
    """One optimizer step's micro-batches; ``begin`` makes it the next step's.

    Losses without weights are divided by the number of micro-batches before backward, as a plain loop does; those with
    weights (items that a loss is the mean of) are multiplied by them, and the sum is divided out before the step.

    Args:
        expected: micro-batches that are going to come, as far as is known.
        strategy: with several ranks, weights are those of all ranks.
    """

    def __init__(self, expected: int, strategy: Any) -> None:
        self._strategy = strategy
        self.begin(expected)

    def begin(self, expected: int) -> None:
        self.expected = expected
        self._seen = 0
        self._unit = 0.0  # the first weight: shares near 1 keep gradients in range
        self._shares = 0.0

    def scaled(self, loss: Tensor, weight: float | None) -> Tensor:
        """``loss`` as it goes into backward."""
        self._seen += 1
        if weight is None:
            if self._unit:
                raise TrainingError("training_step", "no 'weight'", "one in every micro-batch of a step, or in none")
            return loss / self.expected if self.expected > 1 else loss
        if self._seen > 1 and not self._unit:
            raise TrainingError("training_step", "a 'weight'", "one in every micro-batch of a step, or in none")
        if not self._unit:
            self._unit = self._mean_over_ranks(weight) or 1.0
        share = weight / self._unit
        self._shares += share
        return loss if share == 1.0 else loss * share

    def finish(self, optimizer: Optimizer) -> None:
        """Divide out what was not known when losses were scaled."""
        if not self._seen or (self._seen == self.expected and not self._unit):
            return
        factor = self.expected / self._seen
        if self._unit:
            factor = 1.0 / (self._mean_over_ranks(self._shares) or 1.0)
        if factor != 1.0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def _mean_over_ranks(self, value: float) -> float:
        ranks = self._strategy.world_size
        if ranks == 1:
            return value
        return float(self._strategy.reduce(torch.tensor(value, dtype=torch.float64), "sum")) / ranks

    def state_dict(self) -> dict[str, Any]:
        return {"expected": self.expected, "seen": self._seen, "unit": self._unit, "shares": self._shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.expected, self._seen = state["expected"], state["seen"]
        self._unit, self._shares = state["unit"], state["shares"]
