"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common_platform.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointVersionError,
    ConfigError,
)
from trainkit import checkpoint, slurm
from trainkit.ranks import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

LAST, LAST_VALID, BEST = "last", "last-valid", "best"


def find(trainer: Trainer, ckpt_path: str | Path | None) -> tuple[str | Path | None, dict[str, Any] | None]:
    """The checkpoint that ``ckpt_path`` means, and what is in it; None where there is none.

    "last" is the newest in the checkpoint folder, and an error where it is damaged; "last-valid" the newest of those
    that are not damaged, with a warning for each that is. "best" is that of the first ``ModelCheckpoint``. A job that
    SLURM has started again goes on from its newest without being told.

    Raises:
        CheckpointError: it cannot be used.
    """
    trainer.checkpoint_io.wait()
    if ckpt_path is None and trainer.is_fitting and slurm.was_requeued():
        ckpt_path = LAST
        rank_zero_info("a job that was requeued: it goes on from its newest checkpoint")
    if ckpt_path is None:
        return None, None
    match str(ckpt_path):
        case "last":
            path = _last(trainer.checkpoint_dir)
        case "last-valid":
            return _last_valid(trainer)
        case "best":
            path = _best(trainer)
        case _:
            path = Path(ckpt_path)
    return (None, None) if path is None else (path, checkpoint.load_any(path))


def _last(folder: Path) -> Path | None:
    """The newest in ``folder``, where links lead to neighbours and to nothing else.

    Raises:
        CheckpointIncomplete: a link leads to a checkpoint that is gone.
        CheckpointError: one leads out of ``folder``.
    """
    for link in folder.iterdir() if folder.is_dir() else ():
        if not link.is_symlink():
            continue
        target = f"{link.name} -> {link.readlink()}"
        if link.resolve().parent != folder.resolve():
            raise CheckpointError("ckpt_path", target, "a link to a checkpoint beside it")
        if not link.exists():
            raise CheckpointIncomplete("ckpt_path", target, "a link to a checkpoint that is there")
    return checkpoint.find_last(folder)


def _best(trainer: Trainer) -> Path:
    keeper = trainer.checkpoint_callback
    if keeper is None or not keeper.best_model_path:
        raise ConfigError("ckpt_path", BEST, "a ModelCheckpoint that has kept one")
    return Path(keeper.best_model_path)


def _last_valid(trainer: Trainer) -> tuple[Path | None, dict[str, Any] | None]:
    """The first rank chooses, so that all go on from one."""
    if not trainer.is_global_zero:
        chosen = trainer.strategy.broadcast_plain(None)
        return (None, None) if chosen is None else (Path(chosen), checkpoint.load_any(chosen))
    found: tuple[Path | None, dict[str, Any] | None] = (None, None)
    problem: Exception | None = None
    for path in checkpoint.newest_first(trainer.checkpoint_dir):
        try:
            found = (path, checkpoint.load_any(path))
            break
        except (CheckpointCorrupt, CheckpointIncomplete, CheckpointVersionError) as error:
            problem = problem or error
            rank_zero_warn(f"{path.name} is damaged and left out: {error}")
    trainer.strategy.broadcast_plain(None if found[0] is None else str(found[0]))
    if found[0] is None and problem is not None:
        raise problem  # there are some, and none can be read: to begin anew is not what was asked for
    return found
