"""How large gradients are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, float]:
    """The norm of each parameter's gradient, ``grad_2.0_norm/layer.weight``, and of all, ``grad_2.0_norm_total``.

    Args:
        norm_type: above 0; "inf" is the largest absolute value.

    Raises:
        ConfigError: ``norm_type`` is no such number.
    """
    kind = float(norm_type)
    if not kind > 0:
        raise ConfigError("norm_type", norm_type, "above 0, or 'inf'")
    named = [(name, p.grad.detach()) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return {}
    norms = torch.stack([torch.linalg.vector_norm(gradient.float(), kind) for _, gradient in named])
    values = [*norms.tolist(), float(torch.linalg.vector_norm(norms, kind))]
    names = [f"grad_{kind}_norm{group_separator}{name}" for name, _ in named]
    return dict(zip([*names, f"grad_{kind}_norm_total"], values, strict=True))


class GradNorm(Callback):
    """Logs the norm of the gradients, unscaled and not yet clipped, whenever a row of the log is due.

    Args:
        norm_type: above 0, or "inf".
        each_parameter: also that of each parameter, and not of all together only.
        group_separator: between the kind of norm and a parameter's name.
    """

    def __init__(
        self, norm_type: float | int | str = 2.0, *, each_parameter: bool = False, group_separator: str = "/"
    ) -> None:
        if not float(norm_type) > 0:
            raise ConfigError("GradNorm.norm_type", norm_type, "above 0, or 'inf'")
        self.norm_type, self.each_parameter, self.group_separator = norm_type, each_parameter, group_separator

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: TrainModule, optimizer: Optimizer) -> None:
        if not trainer.logs_this_step:
            return
        norms = grad_norm(pl_module, self.norm_type, self.group_separator)
        for name, value in norms.items():
            if self.each_parameter or name.endswith("_total"):
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
