"""A profiler around the Trainer's parts, for a run that wants one; any other run knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainkit.profilers.base import PassThroughProfiler, Profiler

if TYPE_CHECKING:
    from trainkit.loop.fit import FitLoop
    from trainkit.trainer import Trainer

OF_TRAINER = {"backward": "backward", "_make_step": "optimizer_step", "move": "batch_to_device",
              "save_checkpoint": "save_checkpoint"}  # fmt: skip
OF_LOOP = {"_next": "train_dataloader_next", "validate": "run_validation"}


def attach(trainer: Trainer, profiler: Profiler) -> None:
    """Let ``profiler`` see the hooks, batches, steps and checkpoints of ``trainer``."""
    if isinstance(profiler, PassThroughProfiler):
        return
    for method, action in OF_TRAINER.items():
        _wrap(trainer, method, profiler, action)
    trainer.call = _named(trainer.call, profiler)  # type: ignore[method-assign]
    trainer.call_last = _named(trainer.call_last, profiler, "checkpoints.")  # type: ignore[method-assign]
    _wrap(trainer.strategy, "training_step", profiler, "training_step")


def attach_to_loop(loop: FitLoop, profiler: Profiler) -> None:
    """Let ``profiler`` see the loop of one ``fit``."""
    if isinstance(profiler, PassThroughProfiler):
        return
    for method, action in OF_LOOP.items():
        _wrap(loop, method, profiler, action)
    whole = loop._batch

    def batch(batches: Any) -> bool:
        with profiler.profile("run_training_batch"):
            found = whole(batches)
        profiler.step()
        return found

    loop._batch = batch  # type: ignore[method-assign]


def _wrap(owner: Any, method: str, profiler: Profiler, action: str) -> None:
    plain = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return plain(*args, **kwargs)

    setattr(owner, method, timed)


def _named(plain: Callable[..., Any], profiler: Profiler, prefix: str = "") -> Callable[..., Any]:
    def timed(hook: str, *args: Any, **kwargs: Any) -> Any:
        with profiler.profile(f"{prefix}{hook}"):
            return plain(hook, *args, **kwargs)

    return timed
