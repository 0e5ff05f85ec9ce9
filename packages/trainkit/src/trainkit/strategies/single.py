"""One device."""

from __future__ import annotations

import torch
from torch import nn

from trainkit.strategies.base import Strategy


class SingleDevice(Strategy):
    """The whole module on ``device``."""

    name = "single"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: nn.Module = nn.Identity()

    @property
    def module(self) -> nn.Module:
        return self._module

    def setup(self, module: nn.Module, *, trains: bool) -> nn.Module:
        self._module = module.to(self.device)
        return self._module
