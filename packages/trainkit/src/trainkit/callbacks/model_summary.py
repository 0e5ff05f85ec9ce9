"""What a module consists of, as a table before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.move import to_device

if TYPE_CHECKING:
    from rich.table import Table

    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

MIB = 1 << 20


class ModelSummary(Callback):
    """Prints the module's layers, how many parameters each has, and, where the module has an ``example_input_array``,
    the shapes that come in and go out and the floating-point operations of a forward pass.

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

    sample = getattr(module, "example_input_array", None)
    seen = {} if sample is None or type(module).forward is nn.Module.forward else _seen(module, sample)
    titles = ("in", "out", "FLOP") if seen else ()
    table = Table("layer", "kind", "parameters", "trained", "mode", *titles)
    for name, layer in module.named_modules():
        if name and (max_depth == -1 or name.count(".") < max_depth):
            table.add_row(name, *_about(layer), *(seen.get(name, _NEVER) if seen else ()))
    table.add_section()
    about = _about(module)
    table.add_row("all", *about[:3], "", *(seen.get("", _NEVER) if seen else ()))
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    table.caption = f"{size / MIB:,.3f} MiB of parameters"
    return table


def _about(layer: nn.Module) -> tuple[str, str, str, str]:
    sizes = [(p.numel(), p.requires_grad) for p in layer.parameters()]
    trained = sum(size for size, needs in sizes if needs)
    mode = "train" if layer.training else "eval"
    return type(layer).__name__, f"{sum(size for size, _ in sizes):,}", f"{trained:,}", mode


_NEVER = ("-", "-", "-")  # a layer that the forward pass does not call


@torch.no_grad()
def _seen(module: nn.Module, sample: Any) -> dict[str, tuple[str, str, str]]:
    """Shapes in and out and operations of each layer that a forward pass of ``sample`` calls, by the layer's name."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, too

    shapes: dict[str, tuple[str, str]] = {}

    def remember(name: str, _: nn.Module, given: Any, found: Any) -> None:
        shapes.setdefault(name, (_shape(given), _shape(found)))

    handles = [layer.register_forward_hook(partial(remember, name)) for name, layer in module.named_modules()]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    sample = to_device(sample, device)
    with _as_it_was(module), FlopCounterMode(display=False) as counter:
        try:
            _call(module, sample)
        finally:
            for handle in handles:
                handle.remove()
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(module).__name__
    return {n: (*shapes[n], f"{flops.get(f'{root}.{n}' if n else 'Global', 0):,}") for n in shapes}


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """In eval mode, so that nothing is remembered, and without a trace in the random generators."""
    modes = {layer: layer.training for layer in module.modules()}
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        module.eval()
        try:
            yield
        finally:
            for layer, mode in modes.items():
                layer.training = mode


def _call(module: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return module(**sample)
    return module(*sample) if isinstance(sample, tuple) else module(sample)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, tuple | list):
        parts = [_shape(one) for one in value]
        return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key}={_shape(one)}' for key, one in value.items())})"
    return type(value).__name__
