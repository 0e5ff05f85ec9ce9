"""Short runs that leave no trace: not in the model, the Trainer, the loggers or the random generators."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainkit.checkpoint import CheckpointIO
from trainkit.data.seed import rng_state, set_rng_state
from trainkit.loop.fit import Progress
from trainkit.loop.results import Results
from trainkit.loop.stepping import Stepping

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


def sibling(trainer: Trainer, callbacks: list[Any], **limits: Any) -> Trainer:
    """A Trainer on the same devices, with the same precision, that only has ``callbacks`` and other ``limits``.

    In the middle of a fit it takes module and data as they are, without setting them up again.
    """
    other = copy.copy(trainer)
    other.is_nested = trainer.is_fitting
    other.limits = replace(trainer.limits, **limits)
    other.callbacks = other.own_callbacks = callbacks
    other.loggers = []
    other.checkpoint_io = CheckpointIO()
    other.num_sanity_val_steps = 0
    other.progress, other.results = Progress(), Results(trainer.strategy)
    other.stepping = Stepping(other)
    other.should_stop = False
    other.evaluation_metrics, other.predictions = {}, []
    other.fit_loop = None
    other.optimizers, other.managed_optimizers, other.schedulers = [], [], []
    return other


@contextlib.contextmanager
def without_trace(trainer: Trainer, model: TrainModule) -> Iterator[None]:
    """Whatever is done to ``model`` in the block is undone."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    generators, precision = rng_state(), copy.deepcopy(trainer.precision_plugin.state_dict())
    before, modes = model._trainer, {layer: layer.training for layer in model.modules()}
    try:
        yield
    finally:
        model.load_state_dict(weights)
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = needed.get(name, parameter.requires_grad)
        for layer, training in modes.items():
            layer.training = training
        model.trainer = before
        if trainer.datamodule is not None:
            trainer.datamodule.trainer = trainer
        trainer.precision_plugin.load_state_dict(precision)
        set_rng_state(generators)
