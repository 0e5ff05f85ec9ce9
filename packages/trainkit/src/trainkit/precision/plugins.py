"""Precisions: true ones change the dtype of the weights, mixed ones that of operations (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common_platform.errors import ConfigError


class Precision:
    """Full precision: the module's weights as they are."""

    def convert(self, module: nn.Module) -> nn.Module:
        return module

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around forward."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Make gradients comparable with a clipping threshold."""

    def step(self, optimizer: Optimizer) -> bool:
        """The optimizer's step; False where it was skipped because gradients had overflowed."""
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TruePrecision(Precision):
    """Weights, gradients and operations in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def convert(self, module: nn.Module) -> nn.Module:
        return module.to(self._dtype)


class MixedPrecision(Precision):
    """float32 weights, operations in ``dtype`` where that is safe."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self._dtype)


class ScaledMixedPrecision(MixedPrecision):
    """float16 with its small range: the loss is scaled up, and steps whose gradients overflow are skipped."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.float16)
        self.scaler = torch.amp.GradScaler(device.type)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self.scaler.scale(loss))

    def unscale(self, optimizer: Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scaler.load_state_dict(dict(state))


PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


def make_precision(name: str | int, device: torch.device) -> Precision:
    """The precision of that name; 32, 64, "32", "bf16" and "16" are understood as Lightning understands them.

    Raises:
        ConfigError: there is none of that name.
    """
    short = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    match short.get(str(name), str(name)):
        case "32-true":
            return TruePrecision(torch.float32)
        case "64-true":
            return TruePrecision(torch.float64)
        case "bf16-true":
            return TruePrecision(torch.bfloat16)
        case "16-true":
            return TruePrecision(torch.float16)
        case "bf16-mixed":
            return MixedPrecision(torch.bfloat16)
        case "16-mixed":
            return ScaledMixedPrecision(device)
    raise ConfigError("precision", name, f"one of {PRECISIONS}")
