"""Run in a process of its own: what a library's range test finds, as JSON: ``python lr_find.py lightning FOLDER``."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
NAME, FOLDER = sys.argv[1], Path(sys.argv[2])
L = importlib.import_module(NAME)
Tuner = importlib.import_module(f"{NAME}.pytorch.tuner").Tuner


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lr = 0.02
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self) -> Any:
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def curve(mode: str, **settings: Any) -> Any:
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    found = Tuner(L.Trainer(default_root_dir=FOLDER, max_epochs=20, **quiet)).lr_find(model, mode=mode, **settings)
    same = all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    return {"results": found.results, "suggestion": found.suggestion(), "lr": model.lr, "same": same}


print(json.dumps({
    "exponential": curve("exponential", min_lr=1e-5, max_lr=1.0, num_training=60),
    "linear": curve("linear", min_lr=1e-4, max_lr=0.5, num_training=40),
    "diverges": curve("exponential", min_lr=1e-3, max_lr=100.0, num_training=80),
}))  # fmt: skip
