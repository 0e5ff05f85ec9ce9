"""Batch norms whose means and variances are those of all ranks' batches together, on any device.

torch's own ``SyncBatchNorm`` runs on GPUs only. Here a layer becomes an object of a class of its own for the time of
training: parameters, buffers and names stay, so that nothing else of the module notices.
Source: Ioffe and Szegedy 2015; gradients by autograd through two sums over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from trainkit.strategies import process_group


def synchronize(module: nn.Module) -> Callable[[], None]:
    """Let the batch norms of ``module`` count all ranks' batches in training; what is returned undoes it."""
    layers = [(layer, type(layer)) for layer in module.modules() if type(layer) in SYNCHRONIZED]
    for layer, kind in layers:
        layer.__class__ = SYNCHRONIZED[kind]

    def undo() -> None:
        for layer, kind in layers:
            layer.__class__ = kind

    return undo


class _OverRanks(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:  # torch's name of it
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.numel() // x.shape[1]
        sums = _sum(torch.cat([x.sum(dims), x.new_tensor([float(count)])]))  # [channels + 1]
        total = float(sums[-1].detach())
        if total < 2:
            raise ValueError(f"expected more than 1 value per channel when training, got input size {input.shape}")
        mean = sums[:-1] / total
        centred = x - mean.view(shape)
        variance = _sum(centred.square().sum(dims)) / total
        self._remember(mean.detach(), variance.detach() * (total / (total - 1)))
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        found = centred * scale.view(shape)
        return (found if self.bias is None else found + self.bias.view(shape)).to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running mean and the running, unbiased variance towards those of this batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def _sum(value: Tensor) -> Tensor:
    found: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]
    return found


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return process_group.reduce(value, "sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return process_group.reduce(grad, "sum")


SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(kind.__name__, (_OverRanks, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
