"""What one step of AdamW needs of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """Lists of one length; each parameter has the shape and layout of its gradient and of its two moments.

    ``steps``: how many steps each parameter has made, this one included.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """As ``torch.optim.AdamW`` names them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
