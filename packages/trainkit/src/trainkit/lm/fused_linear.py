"""A linear layer as the fused layers compute it, forward and backward: plain, or with an adapter. Hu et al. 2021."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PEFT = ("peft.tuners.lora.layer", "Linear")
SLOTS = 4  # tensors of a Linear


class Linear(NamedTuple):
    """``x @ weight.T + bias + scaling * (x @ down.T) @ up.T``, the last part where there is an adapter."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]
    down: Tensor | None = None  # [rank, in]
    up: Tensor | None = None  # [out, rank]
    scaling: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:SLOTS]  # type: ignore[return-value]


def read(layer: Any) -> Linear | None:
    """What ``layer`` computes now; None where it is not that, or where it draws random numbers."""
    if type(layer) is nn.Linear:
        return Linear(layer.weight, layer.bias)
    kind = type(layer)
    if (kind.__module__, kind.__name__) != PEFT or type(layer.base_layer) is not nn.Linear:
        return None
    base = Linear(layer.base_layer.weight, layer.base_layer.bias)
    if layer.disable_adapters or layer.merged:
        return None if layer.disable_adapters and layer.merged else base
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return base if not active else _with_adapter(layer, base, active)


def _with_adapter(layer: Any, base: Linear, active: list[str]) -> Linear | None:
    if len(active) > 1 or layer.lora_variant or layer.fan_in_fan_out:
        return None
    down, up, dropout = (part[active[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if (
        drops
        or type(down) is not nn.Linear
        or type(up) is not nn.Linear
        or down.bias is not None
        or up.bias is not None
    ):
        return None
    return base._replace(down=down.weight, up=up.weight, scaling=float(layer.scaling[active[0]]))


def regrouped(tensors: Sequence[Any], scalings: Sequence[float]) -> list[Linear]:
    """Linears from the tensors of all of them, one after the other."""
    slots = [tensors[SLOTS * number : SLOTS * (number + 1)] for number in range(len(scalings))]
    return [Linear(w, b, down, up, scaling) for (w, b, down, up), scaling in zip(slots, scalings, strict=True)]


def apply(x: Tensor, linear: Linear, low: torch.dtype | None, *, onto: Tensor | None = None) -> Tensor:
    """The layer's output for ``x``, ``[tokens, in]``; added to ``onto``, where given, in a tensor of its own.

    Args:
        low: the dtype to compute in, in which ``x`` is already; None: that of the weights.
    """
    weight, bias = _cast(linear.weight, low), linear.bias
    adds = onto is not None and onto.dtype == weight.dtype
    if adds:
        found = torch.addmm(onto, x, weight.t())  # type: ignore[arg-type]
        found = found if bias is None else found.add_(bias)
    else:
        found = nn.functional.linear(x, weight, None if bias is None else _cast(bias, low))
    if linear.down is not None and linear.up is not None:
        found.add_(_inner(x, linear.down, low) @ _cast(linear.up, low).t(), alpha=linear.scaling)
    return found if adds or onto is None else onto + found


def _inner(x: Tensor, down: Tensor, low: torch.dtype | None) -> Tensor:
    """``[tokens, rank]``, in the adapter's dtype."""
    down = _cast(down, low)
    return x.to(down.dtype) @ down.t()


def _cast(tensor: Tensor, low: torch.dtype | None) -> Tensor:
    return tensor if low is None else tensor.to(low)


def own_grads(
    grad: Tensor, x: Tensor, linear: Linear, low: torch.dtype | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the layer's four tensors, where they are wanted.

    Args:
        grad: of the output, ``[tokens, out]``.
        x: the input, ``[tokens, in]``.
    """
    found: list[Tensor | None] = [None] * SLOTS
    if needs[0]:
        found[0] = (grad.t() @ x).to(linear.weight.dtype)
    if needs[1] and linear.bias is not None:
        found[1] = grad.sum(0, dtype=linear.bias.dtype)
    if linear.down is None or linear.up is None or not (needs[2] or needs[3]):
        return found
    back, inner = _back(grad, linear, low), _inner(x, linear.down, low)
    found[2] = (back.t() @ x.to(back.dtype)).to(linear.down.dtype)
    found[3] = (grad.to(inner.dtype).t() @ inner).mul_(linear.scaling).to(linear.up.dtype)
    return found


def _back(grad: Tensor, linear: Linear, low: torch.dtype | None) -> Tensor:
    """The gradient of what the adapter has between its matrices, ``[tokens, rank]``."""
    up = _cast(linear.up, low)  # type: ignore[arg-type]
    return (grad.to(up.dtype) @ up).mul_(linear.scaling)


def input_grad(
    grads: Sequence[Tensor], linears: Sequence[Linear], low: torch.dtype | None, dtype: torch.dtype
) -> Tensor:
    """The gradient of an input that several layers share, ``[tokens, in]`` in ``dtype``."""
    total: Tensor | None = None
    for grad, linear in zip(grads, linears, strict=True):
        weight = _cast(linear.weight, low)
        if total is None:
            total = (grad @ weight).to(dtype)
        elif total.dtype == weight.dtype:
            total.addmm_(grad, weight)
        else:
            total.add_(grad @ weight)
        if linear.down is not None:
            total.add_(_back(grad, linear, low) @ _cast(linear.down, low))
    if total is None:
        raise ValueError("input_grad: no layers")
    return total
