"""Logs hold what was logged, in the place that was named."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.trainkit.tiny import Regression, loaders, trainer

from common_platform.errors import ResourceError
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
