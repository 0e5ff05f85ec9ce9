"""``torch.optim.AdamW`` whose step is one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common_platform.errors import ConfigError
from trainkit.kernels.adamw.group import Rates, Tensors
from trainkit.kernels.choice import TRITON, backend_of, module_of


class FusedAdamW(torch.optim.AdamW):
    """AdamW; its state is that of ``torch.optim.AdamW``, so a checkpoint of one is a checkpoint of the other.

    On devices without Triton the step is torch's own.

    Args:
        params: as for any torch optimizer, groups with rates of their own included.
        lr, betas, eps, weight_decay: as ``torch.optim.AdamW`` has them.

    Raises:
        ConfigError: a group asks for ``amsgrad``, ``maximize``, ``capturable`` or ``differentiable``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group[name]:
                    raise ConfigError(f"FusedAdamW.{name}", group[name], "False; torch.optim.AdamW has it")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes the loss again, or None."""
        devices = {p.device for group in self.param_groups for p in group["params"] if p.grad is not None}
        if any(backend_of(device) != TRITON for device in devices):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for device in devices:
                learning = [p for p in group["params"] if p.grad is not None and p.device == device]
                if learning:
                    module_of("adamw", device).adamw_step(self._tensors(learning), _rates(group))
        return loss

    def _tensors(self, parameters: list[Tensor]) -> Tensors:
        states = [self._state(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        return Tensors(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [int(state["step"]) for state in states],
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ConfigError("FusedAdamW.gradient", "sparse", "dense; torch.optim.SparseAdam takes sparse ones")
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _rates(group: dict[str, Any]) -> Rates:
    beta1, beta2 = group["betas"]
    return Rates(lr=float(group["lr"]), beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"])
