"""Trainers come and go in one process, and leave nothing behind: no thread, no child, no memory."""

from __future__ import annotations

import gc
import threading

import psutil
import pytest
from tests.trainkit.tiny import Regression, dataset, trainer
from torch.utils.data import DataLoader

from trainkit.callbacks import EarlyStopping, ModelCheckpoint

WARM_UP = 40


@pytest.mark.slow
def test_two_hundred_trainers_do_not_make_the_process_grow(tmp_path):
    process = psutil.Process()
    threads = sizes = 0
    for number in range(WARM_UP + 200):
        callbacks = [EarlyStopping("val_loss", restore_best=True), ModelCheckpoint(tmp_path / "kept", save_last=True)]
        made = trainer(tmp_path, max_epochs=2, callbacks=callbacks, logger=number % 2 == 0)
        loader = DataLoader(dataset(), 8, num_workers=1 if number % 20 == 0 else 0)
        made.fit(Regression(), loader, DataLoader(dataset(24, 1), 8))
        del made, callbacks, loader
        if number == WARM_UP - 1:
            gc.collect()
            threads, sizes = threading.active_count(), process.memory_info().rss
    gc.collect()
    assert threading.active_count() <= threads
    assert not process.children(recursive=True)
    assert process.memory_info().rss <= 1.02 * sizes
