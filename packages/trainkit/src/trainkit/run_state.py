"""Everything that a resumed run needs, as one dictionary, and back. Its keys are those that Lightning's users know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common_platform.errors import CheckpointError, CheckpointWorldSizeError, CheckpointWriteError
from trainkit.checkpoint.tree import join, split
from trainkit.data.seed import rng_state
from trainkit.loop.fit import Progress
from trainkit.metric_states import load_metric_states, metric_states, name_of

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

WHOLE = "whole"  # how the tensors of a checkpoint lie: any strategy can begin with those that are not cut
PLAIN = (bool, int, float, str, list, tuple, dict, Tensor, type(None))


def dump(trainer: Trainer, *, weights_only: bool = False) -> dict[str, Any]:
    """The state of ``trainer`` and of all that belongs to it.

    Args:
        weights_only: leave out what only a resumed run needs.
    """
    module = trainer.module
    state: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "strategy": {"name": trainer.strategy.name, "layout": WHOLE},
        "state_dict": trainer.strategy.state_dict(),
        "hyper_parameters": plain(module.hparams),
    }
    if trainer.datamodule is not None:
        state["datamodule_hyper_parameters"] = plain(trainer.datamodule.hparams)
    if not weights_only:
        state["loops"] = {"progress": trainer.progress.to_dict(), "fit": trainer.fit_state()}
        state["optimizer_states"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
        state["optimizer_names"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        state["lr_schedulers"] = [plain(setup.scheduler.state_dict()) for setup in trainer.schedulers]
        state["lr_scheduler_names"] = [type(setup.scheduler).__name__ for setup in trainer.schedulers]
        state["precision"] = trainer.precision_plugin.state_dict()
        state["callbacks"] = {c.state_key: saved for c in trainer.callbacks if (saved := c.state_dict())}
        state["loggers"] = [logger.state_dict() for logger in trainer.loggers]
        state["results"] = trainer.results.state_dict(lambda metric: name_of(module, metric))
        state["metric_states"] = metric_states(module)
        state["ranks"] = _of_ranks(trainer)
        if trainer.datamodule is not None and (saved := trainer.datamodule.state_dict()):
            state[type(trainer.datamodule).__qualname__] = saved
    for callback in trainer.callbacks:
        callback.on_save_checkpoint(trainer, module, state)
    module.on_save_checkpoint(state)
    return state


def save(trainer: Trainer, path: str | Path, *, weights_only: bool = False) -> None:
    """Write the state to ``path``: the first rank does, and the others learn how it went.

    Raises:
        CheckpointWriteError: it could not be written.
    """
    if trainer.fit_loop is not None:
        trainer.fit_loop.optimization.look()
    state = dump(trainer, weights_only=weights_only)
    problem: Exception | None = None
    if trainer.is_global_zero:
        try:
            trainer.checkpoint_io.save(path, state.pop("state_dict"), state)
        except Exception as error:  # noqa: BLE001 - raised again below, once the other ranks know
            problem = error
    is_written = trainer.strategy.broadcast_plain(problem is None)
    if problem is not None:
        raise problem
    if not is_written:
        raise CheckpointWriteError("checkpoint", "not written by rank 0", "what its own error says")


def load_before_setup(trainer: Trainer, state: dict[str, Any]) -> None:
    """What is put back before the model is placed: data, weights, callbacks."""
    module, data = trainer.module, trainer.datamodule
    if data is not None and type(data).__qualname__ in state:
        data.load_state_dict(state[type(data).__qualname__])
    module.on_load_checkpoint(state)
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, state)
    trainer.load_weights(state["state_dict"])
    for callback in trainer.callbacks:
        if callback.state_key in state.get("callbacks", {}) and "loops" in state:
            callback.load_state_dict(state["callbacks"][callback.state_key])


def check_layout(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Raises:
    CheckpointError: it was saved by a strategy that cuts tensors in its own way.
    """
    saved = state.get("strategy", {"layout": WHOLE})
    if saved["layout"] != WHOLE:
        raise CheckpointError("ckpt_path", f"saved by {saved['name']}, {saved['layout']}", f"whole tensors for the "
                              f"strategy {trainer.strategy.name}", flag="strategy")  # fmt: skip


def load_after_setup(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """What is put back once optimizers exist.

    Raises:
        CheckpointError: optimizers or schedulers are not those of the checkpoint.
        CheckpointWorldSizeError: another number of ranks, in the middle of an epoch.
    """
    if "optimizer_states" not in state:
        raise CheckpointError("ckpt_path", "weights only", "a checkpoint with the state of training")
    if "loops" not in state or "progress" not in state["loops"]:
        raise CheckpointError("ckpt_path", "of another library", "load_from_checkpoint for its weights")
    _compare("optimizer", state["optimizer_names"], [type(o).__name__ for o in trainer.optimizers])
    _compare("lr_scheduler", state["lr_scheduler_names"], [type(s.scheduler).__name__ for s in trainer.schedulers])
    for optimizer, saved in zip(trainer.optimizers, state["optimizer_states"], strict=True):
        optimizer.load_state_dict(saved)
        optimizer._opt_called = bool(state["global_step"])  # type: ignore[attr-defined] # what schedulers look at
    for setup, saved in zip(trainer.schedulers, state["lr_schedulers"], strict=True):
        setup.scheduler.load_state_dict(saved)
    trainer.precision_plugin.load_state_dict(state["precision"])
    for logger, saved in zip(trainer.loggers, state["loggers"], strict=False):
        logger.resume(saved)
    trainer.results.load_state_dict(state["results"], dict(trainer.module.named_modules()))
    load_metric_states(trainer.module, state["metric_states"])
    trainer.progress = Progress.resumed(state["loops"]["progress"])
    _load_rank(trainer, state)


def _of_ranks(trainer: Trainer) -> list[Any]:
    """What differs from rank to rank, of each."""
    own = {"rng": rng_state(), "loader": trainer.loader_state()}
    if trainer.world_size == 1:
        return [own]
    tensors: dict[str, Tensor] = {}
    about = split(own, tensors)
    as_lists = {name: [str(t.dtype).removeprefix("torch."), t.tolist()] for name, t in tensors.items()}
    found = trainer.strategy.gather_plain({"about": about, "tensors": as_lists})
    return [join(one["about"], _as_tensors(one["tensors"])) for one in found] if trainer.is_global_zero else []


def _as_tensors(lists: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=getattr(torch, kind)) for name, (kind, values) in lists.items()}


def _load_rank(trainer: Trainer, state: Mapping[str, Any]) -> None:
    ranks = state["ranks"]
    if len(ranks) != trainer.world_size:
        if trainer.progress.batch:
            raise CheckpointWorldSizeError("ckpt_path", f"saved in mid-epoch by {len(ranks)} ranks", f"as many, not "
                                           f"{trainer.world_size}, or a checkpoint of an epoch's end")  # fmt: skip
        return
    own = ranks[trainer.global_rank]
    trainer.resume_from(rng=own["rng"], loader=own["loader"], fit=state["loops"]["fit"])


def _compare(what: str, saved: list[str], here: list[str]) -> None:
    if saved != here:
        raise CheckpointError(f"{what}s", ", ".join(saved) or "none", f"{', '.join(here) or 'none'}, as configured")


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state can be written: functions, which the user's code makes again, are left out."""
    return {key: value for key, value in state.items() if isinstance(value, PLAIN)}
