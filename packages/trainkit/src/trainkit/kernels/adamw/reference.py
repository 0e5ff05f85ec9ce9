"""One step of AdamW in plain steps."""

from __future__ import annotations

from trainkit.kernels.adamw.group import Rates, Tensors


def adamw_step(tensors: Tensors, rates: Rates) -> None:
    """Change parameters and moments in place.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; the order of the operations is
    that of ``torch.optim.AdamW``.
    """
    columns = (tensors.parameters, tensors.gradients, tensors.means, tensors.squares, tensors.steps)
    for parameter, gradient, mean, square, step in zip(*columns, strict=True):
        wide = gradient.to(mean.dtype)
        parameter.mul_(1 - rates.lr * rates.weight_decay)
        mean.lerp_(wide, 1 - rates.beta1)
        square.mul_(rates.beta2).addcmul_(wide, wide, value=1 - rates.beta2)
        bias = (1 - rates.beta2**step) ** 0.5
        denominator = (square.sqrt() / bias).add_(rates.eps)
        parameter.addcdiv_(mean, denominator, value=-rates.lr / (1 - rates.beta1**step))
