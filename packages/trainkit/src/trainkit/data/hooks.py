"""What a module and a data module may both say: which loaders there are, and how a batch reaches the device."""

from __future__ import annotations

from typing import Any

import torch

from common_platform.errors import TrainingError
from trainkit.move import to_device


class DataHooks:
    """Loaders that are there only where they are overridden, and transfers that do what is usual."""

    def prepare_data(self) -> None:
        """Download and the like; called once a machine, so nothing may be kept in ``self``."""

    def train_dataloader(self) -> Any:
        raise self._unwritten("train_dataloader")

    def val_dataloader(self) -> Any:
        raise self._unwritten("val_dataloader")

    def test_dataloader(self) -> Any:
        raise self._unwritten("test_dataloader")

    def predict_dataloader(self) -> Any:
        raise self._unwritten("predict_dataloader")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def _unwritten(self, name: str) -> TrainingError:
        return TrainingError(name, f"{type(self).__name__} has none", "a method of it", code="user_code")
