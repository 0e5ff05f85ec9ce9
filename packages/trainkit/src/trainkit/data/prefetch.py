"""The next batch travels to the device while the one before it is computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STREAMS = ("cuda", "xpu")  # devices that copy beside their computations


class DevicePrefetch:
    """Sends batches on a stream of their own. On a device without streams a batch is simply moved.

    Args:
        device: where to.
        move: a batch as the loader made it -> the batch on the device.
    """

    def __init__(self, device: torch.device, move: Callable[[Any], Any]) -> None:
        self._move = move
        self._of_device: Any = torch.get_device_module(device) if device.type in STREAMS else None
        self._stream = self._of_device.Stream(device) if self._of_device is not None else None

    def send(self, batch: Any) -> Any:
        """Begin to move ``batch``; it must be given to ``receive`` before it is used."""
        if self._stream is None:
            return self._move(batch)
        with self._of_device.stream(self._stream):
            return self._move(batch)

    def receive(self, batch: Any) -> Any:
        """``batch`` as later operations may use it."""
        if self._stream is not None:
            current = self._of_device.current_stream()
            current.wait_stream(self._stream)
            for tensor in torch.utils._pytree.tree_leaves(batch):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)  # its memory was asked for on the other stream
        return batch


def is_worth_it(loader: Any, device: torch.device) -> bool:
    """Whether reading ahead hides a copy and changes nothing else: worker processes have read the batch already."""
    return device.type in STREAMS and getattr(loader, "num_workers", 0) > 0
