"""Logs hold what was logged, in the place that was named."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.trainkit.tiny import Regression, loaders, trainer

from common_platform.errors import ResourceError
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import CSVLogger, Logger, TensorBoardLogger, tensorboard


class Remembers(Logger):
    def __init__(self) -> None:
        self.rows, self.ended = [], []

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def finalize(self, status):
        self.ended.append(status)


def test_every_logger_gets_every_row_and_is_told_how_it_ended(tmp_path):
    mine, file = Remembers(), CSVLogger(tmp_path, name="csv", version=3, prefix="a")
    fit = trainer(tmp_path, max_epochs=2, log_every_n_steps=4, logger=[mine, file])
    fit.fit(Regression(), *loaders())
    assert [step for step, row in mine.rows if "train_loss" in row] == [3, 7, 11, 15]
    assert [(step, row["epoch"]) for step, row in mine.rows if "val_loss" in row] == [(7, 0), (15, 1)]
    assert mine.ended == ["success"]
    assert (file.version, file.name) == (3, "csv")
    with Path(tmp_path, "csv", "version_3", "metrics.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    written = [float(row["a-train_loss"]) for row in rows if row["a-train_loss"]]
    assert written == [row["train_loss"] for _, row in mine.rows if "train_loss" in row]


def test_a_logger_is_told_of_checkpoints_that_stand(tmp_path):
    class Keeps(Remembers):
        def __init__(self):
            super().__init__()
            self.kept = []

        def after_save_checkpoint(self, checkpoint_callback):
            path = Path(checkpoint_callback.best_model_path)
            self.kept.append((path.name, (path / "manifest.json").is_file()))

    logger = Keeps()
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=-1)
    trainer(tmp_path, max_epochs=2, logger=logger, callbacks=[keep]).fit(Regression(), *loaders())
    assert logger.kept[0][0] == "epoch=0-step=8.ckpt"
    assert [there for _, there in logger.kept] == [True, True]


def test_a_logger_says_where_it_writes(tmp_path):
    logger = CSVLogger(tmp_path, name="a", version=2)
    where = (logger.save_dir, logger.root_dir, logger.log_dir)
    assert where == (str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "version_2"))
    assert Remembers().log_dir is None
    assert Remembers().group_separator == "/"
    own = Remembers()
    assert own.experiment is own


def test_versions_are_counted(tmp_path):
    for number in range(3):
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"x": 1.0}, 0)
        logger.save()
        assert logger.version == number


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="no tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mine, board = Remembers(), TensorBoardLogger(tmp_path, name="board")
    trainer(tmp_path, max_epochs=2, logger=[mine, board]).fit(Regression(), *loaders())
    events = EventAccumulator(board.log_dir)
    events.Reload()
    for name in ("train_loss", "val_loss"):
        wanted = {step: row[name] for step, row in mine.rows if name in row}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"tensorboard.*pip install 'trainkit\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)
