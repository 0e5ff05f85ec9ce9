"""A small regression to train on: dropout, so that random state matters, and noise, so that order does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainkit


class Regression(trainkit.TrainModule):
    def __init__(self, width: int = 8, lr: float = 1e-2, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Dropout(dropout), nn.Tanh(), nn.Linear(width, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def dataset(count: int = 64, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=generator))


def loaders(batch_size: int = 8, count: int = 64) -> tuple[Any, Any]:
    return DataLoader(dataset(count), batch_size, shuffle=True), DataLoader(dataset(24, 1), batch_size)


def trainer(root: Any, **settings: Any) -> trainkit.Trainer:
    quiet = {"enable_progress_bar": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "log_every_n_steps": 1}
    return trainkit.Trainer(default_root_dir=root, **(quiet | settings))


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports these tests."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path} | more
