"""How a module is spread over devices: few verbs, and the Trainer never asks which strategy it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Strategy(ABC):
    """One module on one or many devices."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @abstractmethod
    def setup(self, module: nn.Module) -> nn.Module:
        """Put ``module`` where it belongs; what is returned is what runs."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients are exchanged in the last one of a step."""
        return nullcontext()

    @abstractmethod
    def clip_gradients(self, *, max_norm: float | None, max_value: float | None) -> Tensor | None:
        """Clip in place by total norm or by value; the norm before clipping, where it was computed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The whole module's state."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
