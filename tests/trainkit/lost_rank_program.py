"""Two ranks of which one is lost: ``python lost_rank_program.py FOLDER FAULT PLACE RANK``. RANK does FAULT at PLACE."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from tests.trainkit.tiny import Regression, dataset
from torch.utils.data import DataLoader

import trainkit
from trainkit.callbacks import Callback, ModelCheckpoint
from trainkit.strategies import DDPStrategy

FOLDER, FAULT, PLACE = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
AT_BATCH = 5
IS_LOST = os.environ.get("RANK", "0") == sys.argv[4]
print(f"pid {os.environ.get('RANK', '0')} {os.getpid()}", file=sys.stderr, flush=True)


def fault() -> None:
    match FAULT:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raises":
            raise ValueError("rank one gives up")
        case "sleeps":
            time.sleep(600)


class Fails(Regression):
    def training_step(self, batch, batch_idx):
        if IS_LOST and PLACE == "forward" and batch_idx == AT_BATCH:
            fault()
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss):
        if IS_LOST and PLACE == "backward" and self.global_step == AT_BATCH:
            fault()


class InHooks(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        if IS_LOST and PLACE == "collective":
            fault()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if IS_LOST and PLACE == "save" and trainer.global_step == AT_BATCH:
            fault()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if IS_LOST and PLACE == "rendezvous":
        fault()
    patience = timedelta(seconds=float(os.environ["PATIENCE_S"]))
    trainer = trainkit.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(
            timeout=patience, rendezvous_timeout=patience if PLACE == "rendezvous" else timedelta(seconds=150)
        ),
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        logger=False,
        default_root_dir=FOLDER,
        callbacks=[InHooks(), ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(Fails(), DataLoader(dataset(64), 4), DataLoader(dataset(8, 1), 4))
