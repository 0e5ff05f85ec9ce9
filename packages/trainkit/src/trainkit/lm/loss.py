"""Cross entropy over a large vocabulary without ever holding all logits, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trainkit.kernels.choice import TRITON, backend_of
from trainkit.kernels.linear_cross_entropy import linear_cross_entropy

ROWS = 64  # tokens whose logits are worked on at a time: what a cache holds


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int = 512
) -> Tensor:
    """The sum of the tokens' cross entropies, in float32.

    Args:
        hidden: ``[tokens, width]``, the states whose next tokens are learnt.
        targets: ``[tokens]`` int64.
        head: states -> logits ``[tokens, vocab]``.
        chunk: tokens whose logits exist at a time.

    Memory: ``chunk x vocab`` instead of ``tokens x vocab``, in both passes. A linear head without a bias makes its
    gradients in the forward pass, while its logits are there, under autocast in its dtype; any other head computes them
    again in the backward pass.
    On a GPU a linear head is cut along the vocabulary instead: ``trainkit.kernels.linear_cross_entropy``.
    """
    if not torch.is_grad_enabled():
        parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        losses = [_part(head, states, wanted) for states, wanted in parts]
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)
    if backend_of(hidden.device, hidden.dtype) == TRITON and _is_linear(head):
        return linear_cross_entropy(hidden, head.weight, targets)
    if _is_linear(head):
        kind = hidden.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):
            total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, targets, chunk, low
            )
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        total = total + checkpoint(_part, head, states, wanted, use_reentrant=False)
    return total


def chunked_logprobs(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int = 512) -> Tensor:
    """The log-probability of each target, ``[tokens]`` float32; memory as ``chunked_cross_entropy`` with any head."""
    parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    if not torch.is_grad_enabled():
        found = [-_part(head, states, wanted, "none") for states, wanted in parts]
    else:
        found = [-checkpoint(_part, head, states, wanted, "none", use_reentrant=False) for states, wanted in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _is_linear(head: Callable[[Tensor], Tensor]) -> TypeGuard[nn.Linear]:
    """Whether the head is its weight and nothing else."""
    if type(head) is not nn.Linear:
        return False
    return head.bias is None and not head._forward_hooks and not head._forward_pre_hooks


def _part(head: Callable[[Tensor], Tensor], states: Tensor, wanted: Tensor, reduction: str = "sum") -> Tensor:
    return cross_entropy(head(states).float(), wanted, reduction=reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of ``hidden @ weight.T``; both gradients are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, low: torch.dtype | None
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        if low is not None:
            hidden, weight = hidden.to(low), weight.to(low)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for start in range(0, len(hidden), chunk):
            states, wanted = hidden[start : start + chunk], targets[start : start + chunk]
            logits = torch.mm(states, weight.t(), out=buffer[: len(states)])
            total += _loss_then_gradient(logits, wanted)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[start : start + chunk])
            if weight_grad is not None:
                _add_product(weight_grad, logits, states)
        found = (hidden_grad, weight_grad)
        ctx.found = [None if part is None else part.to(kind) for part, kind in zip(found, ctx.dtypes, strict=True)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found, ctx.found = ctx.found, None  # scaled in place: a second copy of a large head's gradient is too much
        if found is None:
            raise RuntimeError("chunked_cross_entropy: backward a second time; compute the loss again")
        return (*(None if part is None else part.mul_(grad) for part in found), None, None, None)


def _loss_then_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses; ``logits`` become the gradients of it, in place."""
    total = logits.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(torch.split(logits, ROWS), torch.split(targets, ROWS), strict=True):
        logprobs = torch.log_softmax(rows, -1, dtype=torch.float32)
        chosen = wanted[:, None]
        total -= logprobs.gather(1, chosen).sum()
        rows.copy_(logprobs.exp_())
        rows.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=rows.dtype))
    return total


def _add_product(total: Tensor, logits: Tensor, states: Tensor) -> None:
    if total.dtype == states.dtype:
        total.addmm_(logits.t(), states)
    else:
        total.add_(logits.t() @ states)
