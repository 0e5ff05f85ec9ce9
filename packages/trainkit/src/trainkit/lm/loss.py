"""Cross entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int = 512
) -> Tensor:
    """The sum of the tokens' cross entropies, in float32.

    Args:
        hidden: ``[tokens, width]``, the states whose next tokens are learnt.
        targets: ``[tokens]`` int64.
        head: states -> logits ``[tokens, vocab]``.
        chunk: tokens whose logits exist at a time; they are computed again in the backward pass.

    Memory: ``chunk x vocab`` instead of ``tokens x vocab``.
    """

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), wanted, reduction="sum")

    if len(targets) <= chunk:
        return part(hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        total = total + checkpoint(part, states, wanted, use_reentrant=False)
    return total
