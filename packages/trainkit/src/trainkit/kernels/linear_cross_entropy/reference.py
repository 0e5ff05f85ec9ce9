"""What goes over some columns of the logits, in plain steps."""

from __future__ import annotations

from torch import Tensor


def fold(logits: Tensor, targets: Tensor, first: int, highest: Tensor, total: Tensor, chosen: Tensor) -> None:
    """Take some more columns into each token's maximum and sum.

    Args:
        logits: ``[tokens, columns]``, the columns ``first ...`` of the vocabulary.
        targets: ``[tokens]`` int64.
        highest, total: ``[tokens]`` float32, the maximum so far and the sum of the exponentials below it; changed.
        chosen: ``[tokens]`` float32, the target's logit once it has been met; changed.
    """
    wide = logits.to(highest.dtype)
    higher = wide.amax(dim=1).maximum(highest)
    total.mul_((highest - higher).exp()).add_((wide - higher[:, None]).exp().sum(dim=1))
    highest.copy_(higher)
    is_here = (targets >= first) & (targets < first + logits.shape[1])
    place = (targets - first).where(is_here, 0)
    chosen.copy_(wide.gather(1, place[:, None])[:, 0].where(is_here, chosen))


def to_gradient(logits: Tensor, targets: Tensor, first: int, log_sums: Tensor, scales: Tensor) -> None:
    """Make ``logits`` the gradient of the loss by them, in place: ``(softmax - 1 at the target) * scale``.

    Args:
        log_sums: ``[tokens]`` float32, the logarithm of the sum of the exponentials of all columns.
        scales: ``[tokens]`` float32, the gradient of each token's loss; 0 for one that is not learnt.
    """
    wide = (logits.to(log_sums.dtype) - log_sums[:, None]).exp_()
    is_here = (targets >= first) & (targets < first + logits.shape[1])
    place = (targets - first).where(is_here, 0)
    wide.scatter_add_(1, place[:, None], -is_here[:, None].to(wide.dtype))
    logits.copy_(wide.mul_(scales[:, None]))
