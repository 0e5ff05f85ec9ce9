"""A profiler around the Trainer's parts, for a run that wants one; any other run knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainkit.profilers.base import PassThroughProfiler, Profiler

if TYPE_CHECKING:
    from trainkit.loop.fit import FitLoop


def profiled(profiler: Profiler, function: Callable[..., Any], action: str) -> Callable[..., Any]:
    """``function`` as ``action`` of ``profiler``; itself where that is the one that does nothing."""
    if isinstance(profiler, PassThroughProfiler):
        return function

    def timed(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return function(*args, **kwargs)

    return timed


def profiled_hook(profiler: Profiler, hook: Callable[..., Any] | None, name: str) -> Callable[..., Any] | None:
    """The same for a hook; a profiler also sees those that nobody wrote, which are None."""
    return hook if isinstance(profiler, PassThroughProfiler) else profiled(profiler, hook or _nothing, name)


def _nothing(*_: Any, **__: Any) -> None: ...


def attach_to_loop(loop: FitLoop, profiler: Profiler) -> None:
    """Let ``profiler`` see the batches of one ``fit``."""
    if isinstance(profiler, PassThroughProfiler):
        return
    feed = loop.feed
    feed.read = profiled(profiler, feed.read, "train_dataloader_next")  # type: ignore[method-assign]
    feed.move = profiled(profiler, feed.move, "batch_to_device")
    loop.validate = profiled(profiler, loop.validate, "run_validation")  # type: ignore[method-assign]
    whole = profiled(profiler, loop._batch, "run_training_batch")

    def batch() -> bool:
        found: bool = whole()
        profiler.step()
        return found

    loop._batch = batch  # type: ignore[method-assign]
