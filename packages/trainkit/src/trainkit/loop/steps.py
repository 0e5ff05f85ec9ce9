"""What the user's steps take and return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from common_platform.errors import TrainingError


def step_arguments(step: Callable[..., Any]) -> int:
    """How many of (batch, batch_idx, dataloader_idx) ``step`` takes; one that reads its batches itself takes 1."""
    parameters = inspect.signature(step).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return 3
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values())


def loss_of(outputs: Any) -> tuple[Tensor | None, float | None, dict[str, Any]]:
    """A training step's loss, its weight where it has one, and what else it returned.

    Raises:
        TrainingError: there is no scalar loss with a gradient in it.
    """
    if outputs is None:
        return None, None, {}
    extra: dict[str, Any] = {}
    weight = None
    loss = outputs
    if not isinstance(outputs, Tensor) and isinstance(outputs, Mapping):
        extra = {key: detached(value) for key, value in outputs.items() if key != "loss"}
        loss, weight = outputs.get("loss"), outputs.get("weight")
    wanted = "a scalar loss tensor, {'loss': ...} or None"
    if not isinstance(loss, Tensor):
        raise TrainingError("training_step", type(loss).__name__, wanted, code="user_code")
    if loss.numel() != 1:
        raise TrainingError("training_step", f"a loss of shape {list(loss.shape)}", wanted, code="user_code")
    if not loss.requires_grad:
        raise TrainingError("training_step", "a loss with no grad", "one that depends on parameters", code="user_code")
    return loss, None if weight is None else float(weight), extra


def manual_outputs(outputs: Any) -> dict[str, Any]:
    """What ``on_train_batch_end`` is given in manual optimization."""
    if outputs is None:
        return {}
    if isinstance(outputs, Mapping):
        return {key: detached(value) for key, value in outputs.items()}
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    raise TrainingError("training_step", type(outputs).__name__, "a tensor, a mapping or None", code="user_code")


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
