"""The loss of ``hidden @ weight.T``, some columns of the vocabulary at a time, forward and backward.

The forward pass keeps a running maximum and a running sum for each token, as an online softmax does; the backward pass
makes the same columns again and turns them into gradients in place. Products are the library's, which are as fast as
the device; what goes over the logits between them is one kernel that reads them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainkit.kernels.choice import module_of

IGNORED = -100  # a target that is not learnt, as torch has it
CHUNK = 8192  # columns


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignored: int = IGNORED, chunk: int = CHUNK
) -> Tensor:
    """The sum of the tokens' cross entropies.

    Args:
        hidden: ``[tokens, width]``, float32, bfloat16 or float16 (float64 with torch alone).
        weight: ``[vocab, width]``, the dtype of ``hidden``.
        targets: ``[tokens]`` int64, ``0..vocab - 1`` or ``ignored``.
        ignored: tokens with this target add nothing and get no gradient.
        chunk: columns of the vocabulary whose logits exist at a time.

    Returns:
        A scalar in float32 (float64 for float64). Logits have the dtype of ``hidden``, the softmax is
        float32.

    Memory: ``tokens x chunk`` instead of ``tokens x vocab`` in both passes. Cost: the logits are computed twice.
    With autocast the head is of its dtype, as ``torch.nn.functional.linear`` is.
    Source: Milakov and Gimelshein, 2018 (online softmax); Wijmans et al., "Cut your losses", ICLR 2025.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(kind, enabled=False):  # both passes have the same logits
        found: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, ignored, chunk)  # type: ignore[no-untyped-call]
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, chunk: int) -> Tensor:
        backend = module_of("linear_cross_entropy", hidden.device, hidden.dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        highest = torch.full((len(hidden),), float("-inf"), dtype=wide, device=hidden.device)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        for first in range(0, len(weight), chunk):
            logits = hidden @ weight[first : first + chunk].t()
            backend.fold(logits, targets, first, highest, total, chosen)
        log_sums = highest + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.ignored, ctx.chunk = ignored, chunk
        return torch.where(targets == ignored, 0.0, log_sums - chosen).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, log_sums = ctx.saved_tensors
        backend = module_of("linear_cross_entropy", hidden.device, hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        scales = torch.where(targets == ctx.ignored, 0.0, grad.to(log_sums.dtype))
        hidden_grad = torch.zeros(hidden.shape, dtype=log_sums.dtype, device=hidden.device) if wants_hidden else None
        weight_grad = torch.empty_like(weight) if wants_weight else None
        for first in range(0, len(weight), ctx.chunk):
            some = weight[first : first + ctx.chunk]
            logits = hidden @ some.t()
            backend.to_gradient(logits, targets, first, log_sums, scales)
            if hidden_grad is not None:
                hidden_grad += logits @ some
            if weight_grad is not None:
                torch.mm(logits.t(), hidden, out=weight_grad[first : first + ctx.chunk])
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, None, None, None
