"""Keep checkpoints: the best ones by a metric, the last one, or one every so often."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError, TrainingError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

FIELD = re.compile(r"\{(\w+)(:[^}]*)?\}")


class ModelCheckpoint(Callback):
    """Saves checkpoints, each a folder. An old one is removed only after the new one is complete.

    Args:
        dirpath: default ``default_root_dir/checkpoints``.
        filename: with fields such as ``{epoch}``, ``{step}`` and metrics, ``{val_loss:.2f}``.
        monitor: the metric by which the best are chosen; None keeps the newest.
        mode: "min" or "max".
        save_top_k: how many are kept; -1 all, 0 none.
        save_last: also keep the newest as ``last``.
        every_n_train_steps: save in training, every so many optimizer steps; 0: not.
        every_n_epochs: save at the end of every so many epochs, where ``every_n_train_steps`` is 0.
        save_on_exception: save ``last`` when training is left by an exception, Ctrl-C included.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "epoch={epoch}-step={step}",
        monitor: str | None = None,
        mode: str = "min",
        *,
        save_top_k: int = 1,
        save_last: bool = False,
        every_n_train_steps: int = 0,
        every_n_epochs: int = 1,
        save_on_exception: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError("ModelCheckpoint.mode", mode, "'min' or 'max'")
        if save_top_k < -1 or every_n_train_steps < 0 or every_n_epochs < 0:
            raise ConfigError("ModelCheckpoint.save_top_k", save_top_k, "-1 or more; the intervals 0 or more")
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self.filename = filename
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.save_on_exception = save_on_exception
        self.best_model_path = ""
        self.best_model_score: float | None = None
        self.last_model_path = ""
        self._kept: dict[str, float] = {}  # path -> score, best first
        self._saved_step = -1

    @property
    def state_key(self) -> str:
        return f"ModelCheckpoint({self.monitor},{self.mode},{self.every_n_train_steps},{self.every_n_epochs})"

    def folder(self, trainer: Trainer) -> Path:
        return self.dirpath or trainer.default_root_dir / "checkpoints"

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_train_steps and step % self.every_n_train_steps == 0 and step != self._saved_step:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, module: TrainModule) -> None:
        by_epoch = not self.every_n_train_steps and self.every_n_epochs
        if by_epoch and self.monitor and trainer.is_fitting and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: TrainModule) -> None:
        by_epoch = not self.every_n_train_steps and self.every_n_epochs
        if (
            by_epoch
            and (trainer.current_epoch + 1) % self.every_n_epochs == 0
            and trainer.global_step != self._saved_step
        ):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, module: TrainModule, exception: BaseException) -> None:
        if self.save_on_exception and trainer.is_fitting and trainer.global_step > max(self._saved_step, 0):
            trainer.save_checkpoint(self.folder(trainer) / "last")

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        score = self._score(trainer)
        if self.save_top_k and self._is_kept(score):
            path = self.folder(trainer) / self._name(trainer)
            self._kept[str(path)] = score
            removed = self._order()
            trainer.save_checkpoint(path)
            for old in removed:
                shutil.rmtree(old, ignore_errors=True)
        if self.save_last:
            self.last_model_path = str(self.folder(trainer) / "last")
            trainer.save_checkpoint(self.last_model_path)

    def _score(self, trainer: Trainer) -> float:
        """Lower is better; without a metric, newer is."""
        if self.monitor is None:
            return -float(trainer.global_step)
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            known = sorted(trainer.callback_metrics)
            raise TrainingError("ModelCheckpoint.monitor", self.monitor, f"a logged metric: {known}", code="user_code")
        score = score if self.mode == "min" else -score
        return score if math.isfinite(score) else math.inf

    def _is_kept(self, score: float) -> bool:
        return self.save_top_k == -1 or len(self._kept) < self.save_top_k or score < max(self._kept.values())

    def _order(self) -> list[str]:
        """Sort by score; the paths that are one too many."""
        ranked = sorted(self._kept.items(), key=lambda item: item[1])
        keep = len(ranked) if self.save_top_k == -1 else self.save_top_k
        self._kept = dict(ranked[:keep])
        self.best_model_path, best = ranked[0]
        self.best_model_score = None if self.monitor is None else best if self.mode == "min" else -best
        return [path for path, _ in ranked[keep:]]

    def _name(self, trainer: Trainer) -> str:
        values: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        values |= trainer.callback_metrics
        name = FIELD.sub(lambda m: format(values.get(m[1], 0), (m[2] or ":")[1:]), self.filename)
        return re.sub(r"[^A-Za-z0-9_.+=-]", "_", name)

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": dict(self._kept),
            "best_model_path": self.best_model_path,
            "best_model_score": self.best_model_score,
            "saved_step": self._saved_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = {path: score for path, score in state["kept"].items() if Path(path).is_dir()}
        self.best_model_path, self.best_model_score = state["best_model_path"], state["best_model_score"]
        self._saved_step = state["saved_step"]
