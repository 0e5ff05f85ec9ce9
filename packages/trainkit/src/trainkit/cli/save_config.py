"""The whole configuration of a run, kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class SaveConfigCallback(Callback):
    """Writes ``config.yaml`` beside the logs and beside the checkpoints: ``--config`` with it makes the run again.

    Args:
        parser: knows how the configuration is written.
        config: of the run.
        config_filename: its name.
        overwrite: replace one with other settings in the logger's folder.
        save_to_log_dir: False: ``save_config`` alone writes, where a subclass wants it.

    Raises:
        ConfigError: one with other settings is in the logger's folder.
    """

    def __init__(
        self,
        parser: Any,
        config: Any,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        if multifile:
            raise ConfigError("multifile", True, "False: the configuration is one file")
        self.parser, self.config, self.config_filename = parser, config, config_filename
        self.overwrite, self.save_to_log_dir = overwrite, save_to_log_dir

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            if self.save_to_log_dir:
                self._write(trainer, stage)
            self.save_config(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        """For subclasses: called on the first rank only, once a stage."""

    def _write(self, trainer: Trainer, stage: str) -> None:
        text = self.parser.dump(self.config)
        path = Path(trainer.log_dir or trainer.default_root_dir, self.config_filename)
        if path.is_file() and path.read_text() != text and not self.overwrite and stage == "fit":
            raise ConfigError("config.yaml", "other settings in the same folder", "another version of the logger, or "
                              "save_config_kwargs={'overwrite': True}")  # fmt: skip
        if stage != "fit" and path.is_file():
            return
        folders = [path.parent]
        if stage == "fit" and trainer.checkpoint_callback is not None:
            folders.append(trainer.checkpoint_dir)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{self.config_filename}.new"
            temporary.write_text(text)
            temporary.replace(folder / self.config_filename)
