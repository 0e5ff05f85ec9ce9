"""One device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from trainkit.strategies.base import Strategy


class SingleDevice(Strategy):
    """The whole module on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: nn.Module = nn.Identity()

    def setup(self, module: nn.Module) -> nn.Module:
        self._module = module.to(self.device)
        return self._module

    def clip_gradients(self, *, max_norm: float | None, max_value: float | None) -> Tensor | None:
        if max_value is not None:
            clip_grad_value_(self._module.parameters(), max_value)
        return None if max_norm is None else clip_grad_norm_(self._module.parameters(), max_norm)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._module.load_state_dict(state)
