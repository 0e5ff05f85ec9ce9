"""Keep checkpoints: the best ones by a metric, the last one, or one every so often."""

from __future__ import annotations

import math
import re
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Checkpoint

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

FIELD = re.compile(r"\{([^}:]*)(:[^}]*)?\}")


class ModelCheckpoint(Checkpoint):
    """Saves checkpoints, each a folder. An old one is removed only after the new one is complete.

    Args:
        dirpath: default ``default_root_dir/checkpoints``.
        filename: with fields such as ``{epoch}``, ``{step}`` and metrics, ``{val_loss:.2f}``; default
            ``{epoch}-{step}``. A field is written as ``name=value``.
        monitor: the metric by which the best are chosen; None keeps the newest.
        verbose: print what is kept.
        save_last: also keep the newest as ``last``; "link": as a link to the newest that is kept.
        save_top_k: how many are kept; -1 all, 0 none. Without a metric the newest ones: 2 or more leave one to go on
            from (``ckpt_path="last-valid"``) when the newest is damaged.
        save_on_exception: save ``last`` when training is left by an exception, Ctrl-C included; on several ranks by
            Ctrl-C only.
        save_weights_only: what ``load_from_checkpoint`` needs, and not what a resumed run needs.
        mode: "min" or "max".
        auto_insert_metric_name: write fields as ``name=value`` and not as the value alone.
        every_n_train_steps: save in training, every so many optimizer steps.
        train_time_interval: save in training, when so much time has passed since the last time.
        every_n_epochs: save at the end of every so many epochs; 1, if nothing else is said.
        save_on_train_epoch_end: after the epoch and not after its validation; default: unless it validates otherwise
            than once an epoch.
        enable_version_counter: put ``-v1`` behind a name that is taken, instead of replacing what stands there.

    Raises:
        ConfigError: an argument is out of its range, or two ways of saving are asked for at once.
    """

    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError("ModelCheckpoint.mode", mode, "'min' or 'max'")
        if save_top_k < -1:
            raise ConfigError("ModelCheckpoint.save_top_k", save_top_k, "-1 or more")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ConfigError("ModelCheckpoint.every_n_train_steps", every_n_train_steps, "1 or more, or None")
        if every_n_epochs is not None and every_n_epochs < 0:
            raise ConfigError("ModelCheckpoint.every_n_epochs", every_n_epochs, "0 or more")
        ways = [every_n_train_steps, train_time_interval, every_n_epochs]
        if sum(bool(way) for way in ways) > 1:
            raise ConfigError(
                "ModelCheckpoint", ways, "one of every_n_train_steps, train_time_interval, every_n_epochs"
            )
        if save_last not in (None, True, False, "link"):
            raise ConfigError("ModelCheckpoint.save_last", save_last, "True, False or 'link'")
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self.filename = filename or "{epoch}-{step}"
        self.monitor = monitor
        self.verbose = verbose
        self.mode = mode
        self.save_top_k = save_top_k
        self.save_last = save_last or False
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = train_time_interval
        self.every_n_epochs = 1 if every_n_epochs is None and not any(ways) else every_n_epochs or 0
        self.enable_version_counter = enable_version_counter
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.current_score: Tensor | None = None
        self.last_model_path = ""
        self._on_train_epoch_end = save_on_train_epoch_end
        self._kept: dict[str, float] = {}  # path -> score, best first; lower is better
        self._saved_step = -1
        self._saved_at = time.monotonic()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self.every_n_train_steps,
            every_n_epochs=self.every_n_epochs,
            train_time_interval=str(self.train_time_interval),
        )

    @property
    def writes_all_names(self) -> bool:
        """Whether two such callbacks in one folder could write one name."""
        return not self.enable_version_counter or bool(self.save_last)

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The path of each kept checkpoint, and its score."""
        return {path: torch.tensor(self._signed(score)) for path, score in self._kept.items()}

    def folder(self, trainer: Trainer) -> Path:
        return self.dirpath or trainer.default_root_dir / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.every_n_train_steps, trainer.global_step
        if (every and step % every == 0 and step) or (self.train_time_interval and self._time_is_up(trainer)):
            self._save(trainer)

    def _time_is_up(self, trainer: Trainer) -> bool:
        interval = self.train_time_interval or timedelta(0)
        is_up = time.monotonic() - self._saved_at >= interval.total_seconds()
        return bool(trainer.strategy.broadcast_plain(is_up))

    def on_validation_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if not self._saves_after_epoch(trainer):
            self._save_of_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._saves_after_epoch(trainer):
            self._save_of_epoch(trainer)

    def _saves_after_epoch(self, trainer: Trainer) -> bool:
        if self._on_train_epoch_end is not None:
            return self._on_train_epoch_end
        limits = trainer.limits
        has_validation = trainer.fit_loop is not None and bool(trainer.fit_loop.validation)
        once_an_epoch = limits.check_val_every_n_epoch == 1 and limits.val_check_interval == 1.0
        return not has_validation or once_an_epoch

    def _save_of_epoch(self, trainer: Trainer) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: TrainModule, exception: BaseException) -> None:
        wanted = self.save_on_exception and self.may_save_after(exception, trainer)
        if wanted and trainer.is_fitting and trainer.global_step > max(self._saved_step, 0):
            self.save_last_now(trainer)

    def save_last_now(self, trainer: Trainer) -> None:
        """Save ``last`` as things stand, whatever is due; every rank must call it."""
        self._saved_step = trainer.global_step
        self.last_model_path = str(self._last(trainer))
        trainer.save_checkpoint(self.last_model_path)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.is_fitting or trainer.sanity_checking or trainer.global_step == self._saved_step:
            return
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        score = trainer.strategy.broadcast_plain(self._score(trainer))
        kept: Path | None = None
        if self.save_top_k and self._is_kept(score):
            kept = path = self._path(trainer)
            self._kept[str(path)] = score
            removed = self._order(str(path))
            trainer.save_checkpoint(path, weights_only=self.save_weights_only)
            if self.verbose:
                trainer.print(f"epoch {trainer.current_epoch}, step {trainer.global_step}: kept as {path.name}")
            for old in removed:
                if old != str(path):
                    trainer.remove_checkpoint(old)
        if self.save_last:
            self._save_last(trainer, kept)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _save_last(self, trainer: Trainer, kept: Path | None) -> None:
        last = self._last(trainer)
        self.last_model_path = str(last)
        if self.save_last != "link" or kept is None:
            if last.is_symlink():
                trainer.remove_checkpoint(last)
            trainer.save_checkpoint(last, weights_only=self.save_weights_only)
        elif trainer.is_global_zero:
            trainer.checkpoint_io.then(lambda: _link(last, kept))

    def _last(self, trainer: Trainer) -> Path:
        return self.folder(trainer) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def _score(self, trainer: Trainer) -> float:
        """Lower is better; without a metric, newer is."""
        if self.monitor is None:
            return -float(trainer.global_step)
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            known = sorted(trainer.callback_metrics)
            raise ConfigError("ModelCheckpoint.monitor", self.monitor, f"a logged metric: {known}")
        self.current_score = score.detach().cpu()
        signed = self._signed(float(score))
        return signed if math.isfinite(signed) else math.inf

    def _signed(self, score: float) -> float:
        return score if self.mode == "min" else -score

    def _is_kept(self, score: float) -> bool:
        return self.save_top_k == -1 or len(self._kept) < self.save_top_k or score < max(self._kept.values())

    def _order(self, newest: str) -> list[str]:
        """Sort by score; the paths that are one too many."""
        ranked = sorted(self._kept.items(), key=lambda item: item[1])
        keep = len(ranked) if self.save_top_k == -1 else self.save_top_k
        self._kept = dict(ranked[:keep])
        self.best_model_path, best = ranked[0] if self.monitor is not None else (newest, 0.0)
        self.best_model_score = None if self.monitor is None else torch.tensor(self._signed(best))
        return [path for path, _ in ranked[keep:]]

    def _path(self, trainer: Trainer) -> Path:
        name = self.format_checkpoint_name(
            {"epoch": trainer.current_epoch, "step": trainer.global_step} | trainer.callback_metrics
        )
        path = self.folder(trainer) / name
        version = 0
        while self.enable_version_counter and path.exists():
            version += 1
            path = path.with_name(f"{Path(name).stem}-v{version}{self.FILE_EXTENSION}")
        return Path(trainer.strategy.broadcast_plain(str(path)))

    def format_checkpoint_name(self, metrics: dict[str, Any]) -> str:
        """The name of a checkpoint with these metrics: ``filename`` with its fields filled in."""

        def field(match: re.Match[str]) -> str:
            value = metrics.get(match[1], 0)
            value = value.item() if isinstance(value, Tensor) else value
            written = format(value, (match[2] or ":")[1:])
            return f"{match[1]}={written}" if self.auto_insert_metric_name else written

        parts = [re.sub(r"[^A-Za-z0-9_.+=-]", "_", part) for part in FIELD.sub(field, self.filename).split("/")]
        return "/".join(part for part in parts if part not in ("", ".", "..")) + self.FILE_EXTENSION

    @property
    def kth_best_model_path(self) -> str:
        """The worst of those that are kept."""
        return max(self._kept, key=lambda path: self._kept[path], default="")

    @property
    def kth_value(self) -> Tensor | None:
        """Its score."""
        return torch.tensor(self._signed(self._kept[self.kth_best_model_path])) if self._kept else None

    def to_yaml(self, filepath: str | Path | None = None) -> None:
        """Write path and score of each kept checkpoint, a line each; default ``best_k_models.yaml`` beside them."""
        if filepath is None and self.dirpath is None and not self._kept:
            raise ConfigError("filepath", None, "a path: nothing is kept yet")
        folder = self.dirpath or Path(next(iter(self._kept), ".")).parent
        lines = [f"{path}: {score.item()}\n" for path, score in self.best_k_models.items()]
        Path(filepath or folder / "best_k_models.yaml").write_text("".join(lines))

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": dict(self._kept),
            "best_model_path": self.best_model_path,
            "best_model_score": self.best_model_score,
            "last_model_path": self.last_model_path,
            "saved_step": self._saved_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = {path: score for path, score in state_dict["kept"].items() if Path(path).is_dir()}
        self.best_model_path, self.best_model_score = state_dict["best_model_path"], state_dict["best_model_score"]
        self.last_model_path, self._saved_step = state_dict["last_model_path"], state_dict["saved_step"]


def _link(last: Path, target: Path) -> None:
    """Let ``last`` lead to ``target``, in place of what stood there."""
    if last.is_dir() and not last.is_symlink():
        shutil.rmtree(last)
    new = last.with_name(f".{last.name}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(target.name, target_is_directory=True)
    new.replace(last)
