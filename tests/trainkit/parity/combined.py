"""Run in a process of its own: what a library's combined loaders give, alone and in training, as JSON.

``python combined.py lightning FOLDER CASES`` and the same with ``trainkit`` print the same object. A case is a list of
lengths, of loaders that are read together.
"""

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
NAME, FOLDER, CASES = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
L = importlib.import_module(NAME)
CombinedLoader = importlib.import_module(f"{NAME}.pytorch.utilities").CombinedLoader
MODES = ("min_size", "max_size", "max_size_cycle", "sequential")


def plain(value: Any) -> Any:
    """Batches as JSON."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def alone(lengths: list[int], mode: str) -> Any:
    loaders = [DataLoader(range(10 * i, 10 * i + n), 2) for i, n in enumerate(lengths)]
    form = {"first": loaders[0], "rest": loaders[1:]} if len(loaders) > 1 else loaders
    combined = CombinedLoader(form, mode)
    rows = [plain(list(row)) for row in iter(combined)]
    again = [plain(list(row)) for row in iter(combined)]
    limited = CombinedLoader(form, mode)
    limited.limits = 1
    few = [plain(list(row)) for row in iter(limited)][: len(limited)]  # Lightning counts a limit, and then goes on
    return {"rows": rows, "again": again, "length": len(combined), "limited": few}


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Any:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        found = [(self.net(part[0]) - part[0].sum()).square().mean() for part in parts if part is not None]
        return sum(found)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(count: int, seed: int) -> DataLoader:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), 2, shuffle=True)


def training(mode: str | None) -> Any:
    torch.manual_seed(4)
    form: Any = {"a": loader(5, 0), "b": loader(11, 1)}
    checked: Any = {"a": loader(4, 2), "b": loader(6, 3)}
    model = Model()
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    fit = L.Trainer(default_root_dir=FOLDER, max_epochs=2, limit_train_batches=0.75, **quiet)
    both = (form, checked) if mode is None else (CombinedLoader(form, mode), CombinedLoader(checked, mode))
    fit.fit(model, *both)
    metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
    return {"losses": model.losses, "metrics": metrics, "steps": fit.global_step}


found = {f"{mode} {lengths}": alone(lengths, mode) for mode in MODES for lengths in CASES}
found |= {f"training {mode}": training(mode) for mode in (None, "min_size", "max_size", "max_size_cycle")}
print(json.dumps(found))
