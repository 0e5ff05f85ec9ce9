"""Copies beside the computation: a stream of their own on a GPU, and nothing at all on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class CopyStream(Protocol):
    """Where copies are queued; the host waits for none of them."""

    def copies(self) -> AbstractContextManager[Any]:
        """What is queued within it runs on the stream, after the copies queued before."""

    def after_compute(self) -> None:
        """Copies queued from now on wait for the computation queued so far."""

    def before_compute(self) -> None:
        """Computation queued from now on waits for the copies queued so far."""

    def keep(self, tensor: Tensor) -> None:
        """The memory of ``tensor``, which the copies use, is not handed out anew before they are done."""


class NoStream:
    """Of a device on which a copy is done when the call returns."""

    def copies(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def after_compute(self) -> None:
        """Nothing is queued."""

    def before_compute(self) -> None:
        """Nothing is queued."""

    def keep(self, tensor: Tensor) -> None:
        """It is used no longer."""


class DeviceStream:
    """Of CUDA or ROCm; its copies overlap with computation where the host's memory is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copies(self) -> AbstractContextManager[Any]:
        within: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return within

    def after_compute(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def before_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)


def copy_stream_of(device: torch.device) -> CopyStream:
    return DeviceStream(device) if device.type == "cuda" else NoStream()
