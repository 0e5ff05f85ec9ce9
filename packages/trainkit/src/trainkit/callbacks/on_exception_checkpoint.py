"""Keep the state that a run had when it was left by an exception."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Checkpoint

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class OnExceptionCheckpoint(Checkpoint):
    """Saves ``dirpath/filename.ckpt`` when training is left by an exception, Ctrl-C included; on several ranks by
    Ctrl-C only, since what one rank raises the others do not.

    Args:
        dirpath: the folder.
        filename: the name in it, without ending.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | Path, filename: str = "on_exception") -> None:
        if not filename:
            raise ConfigError("OnExceptionCheckpoint.filename", filename, "a name")
        self.dirpath, self.filename = Path(dirpath), filename

    @property
    def ckpt_path(self) -> str:
        return str(self.dirpath / (self.filename + self.FILE_EXTENSION))

    def on_exception(self, trainer: Trainer, pl_module: TrainModule, exception: BaseException) -> None:
        if trainer.is_fitting and self.may_save_after(exception, trainer):
            trainer.save_checkpoint(self.ckpt_path)
