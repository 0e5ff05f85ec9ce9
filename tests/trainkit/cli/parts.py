"""A module and a data module that command lines name by class path."""

from __future__ import annotations

from typing import Any

import torch
from tests.trainkit.tiny import Regression, dataset
from torch.utils.data import DataLoader

import trainkit
from trainkit.schedules import warmup_schedule


class Net(Regression):
    def __init__(self, width: int = 8, lr: float = 1e-2) -> None:
        super().__init__(width=width, lr=lr, dropout=0.0)
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


class Warms(Net):
    def __init__(self, warmup_steps: int = 0, total_steps: int = 10) -> None:
        super().__init__()
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [warmup_schedule(optimizer, warmup_steps=self.warmup_steps, total_steps=self.total_steps)]


class Data(trainkit.DataModule):
    def __init__(self, batch_size: int = 8, count: int = 32) -> None:
        super().__init__()
        self.batch_size, self.count = batch_size, count

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(self.count), self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Diverges(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * float("nan")
