"""What a module consists of, as a table before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from rich.table import Table

    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class ModelSummary(Callback):
    """Prints the module's layers and how many parameters each has.

    Args:
        max_depth: of nested layers; -1: all.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if max_depth < -1:
            raise ConfigError("ModelSummary.max_depth", max_depth, "-1 or more")
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.is_global_zero and self.max_depth:
            from rich.console import Console  # imported where it is needed: it is slow to import

            Console(stderr=True).print(summary(pl_module, self.max_depth))


class RichModelSummary(ModelSummary):
    """The same by its other name."""


def summary(module: nn.Module, max_depth: int = 1) -> Table:
    """The layers of ``module`` down to ``max_depth``, and at the end the sums."""
    from rich.table import Table

    table = Table("layer", "kind", "parameters", "trained", "mode")
    for name, layer in module.named_modules():
        if name and (max_depth == -1 or name.count(".") < max_depth):
            sizes = [(p.numel(), p.requires_grad) for p in layer.parameters()]
            trained = sum(size for size, needs in sizes if needs)
            mode = "train" if layer.training else "eval"
            table.add_row(name, type(layer).__name__, f"{sum(s for s, _ in sizes):,}", f"{trained:,}", mode)
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    table.add_section()
    table.add_row("all", type(module).__name__, f"{total:,}", f"{trained:,}", "")
    return table
