"""The layers of Llama, Mistral, Qwen2 and Qwen3 for fine-tuning on a CPU: fewer passes over memory, the same numbers.

A layer is two autograd functions with attention between them. Each keeps only what its backward pass cannot cheaply
compute again (norms, activations and the weights in a lower precision are), adds residuals inside the matrix product,
and works in place. Linear layers may wear an adapter. Under autocast products are computed in its dtype and all else in
that of the weights. The results differ from transformers' own layers by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainkit.lm import fused_linear
from trainkit.lm.attention import Documents, attend_by_document
from trainkit.lm.fused_linear import SLOTS, Linear, regrouped

BACKBONES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SILU = {"silu", "swish"}
RECOMPUTES_MLP = "trainkit_recomputes_mlp"  # an attribute of a backbone


def can_fuse(backbone: Any) -> bool:
    """Whether ``backbone`` is made of layers that ``fused_backbone`` computes exactly as they are written.

    Hooks, quantized or replaced layers, dropout and other devices than the CPU are reasons not to.
    """
    if type(backbone).__name__ not in BACKBONES:
        return False
    config: Any = backbone.config
    if config.hidden_act not in SILU or (backbone.training and getattr(config, "attention_dropout", 0.0)):
        return False
    parts = [backbone, backbone.norm, *backbone.layers.modules()]  # those that are not called here; the others are
    linears = [part for name, part in backbone.named_modules() if name.rpartition(".")[2] in LINEARS]
    return (
        len(linears) == len(LINEARS) * len(backbone.layers)
        and all(fused_linear.read(part) is not None for part in linears)
        and all(parameter.is_cpu for parameter in backbone.parameters())
        and not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
    )


def fused_backbone(backbone: Any, input_ids: Tensor, position_ids: Tensor, documents: Documents) -> Tensor:
    """The last hidden states of packed documents, as ``backbone`` computes them.

    Args:
        backbone: one that ``can_fuse`` accepts.
        input_ids, position_ids: ``[1, tokens]``.
        documents: where each begins and ends.

    Returns:
        ``[tokens, width]``, after the last norm.
    """
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    with torch.autocast("cpu", enabled=False):  # what is computed in which dtype is said below
        return _layers(backbone, input_ids, position_ids, documents, low)


def _layers(
    backbone: Any, input_ids: Tensor, position_ids: Tensor, documents: Documents, low: torch.dtype | None
) -> Tensor:
    embedded = backbone.embed_tokens(input_ids)
    cos, sin = (part[0] for part in backbone.rotary_emb(embedded, position_ids=position_ids))
    states = embedded[0]
    recompute = backbone.training and getattr(backbone, "gradient_checkpointing", False)
    keeps_mlp = not getattr(backbone, RECOMPUTES_MLP, False)
    for layer in backbone.layers[: backbone.config.num_hidden_layers]:
        window = getattr(layer.self_attn, "sliding_window", getattr(backbone.config, "sliding_window", None))
        about = (layer, states, cos, sin, documents, window, low, keeps_mlp)
        states = checkpoint(_layer, *about, use_reentrant=False) if recompute else _layer(*about)
    found: Tensor = _FinalNorm.apply(  # type: ignore[no-untyped-call]
        states, backbone.norm.weight, backbone.norm.variance_epsilon
    )
    return found


def _layer(
    layer: Any, states: Tensor, cos: Tensor, sin: Tensor, documents: Documents, window: int | None,
    low: torch.dtype | None, keeps_mlp: bool,
) -> Tensor:  # fmt: skip
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    tensors, scalings = _taken_apart(attention.q_proj, attention.k_proj, attention.v_proj)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    head_norms = [None if norm is None else norm.weight for norm in norms]
    query, key, value = _Projections.apply(  # type: ignore[no-untyped-call]
        states, before.weight, before.variance_epsilon, cos, sin, attention.head_dim, low, scalings,
        *head_norms, getattr(norms[0], "variance_epsilon", 0.0), *tensors,
    )  # fmt: skip
    attended = attend_by_document(query, key, value, documents, scale=attention.scaling, window=window)
    tensors, scalings = _taken_apart(attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    found: Tensor = _Rest.apply(  # type: ignore[no-untyped-call]
        states, attended.flatten(1), after.weight, after.variance_epsilon, low, scalings, keeps_mlp, *tensors
    )
    return found


def _taken_apart(*layers: nn.Module) -> tuple[list[Tensor | None], list[float]]:
    """The tensors of all ``layers`` one after the other, and the scalings of their adapters."""
    linears = [fused_linear.read(layer) or Linear(layer.weight) for layer in layers]  # type: ignore[arg-type]
    return [part for linear in linears for part in linear.tensors], [linear.scaling for linear in linears]


# --- the norm: Zhang and Sennrich 2019 ---


def _scale_of(x: Tensor, epsilon: float) -> Tensor:
    """``1 / rms`` over the last dim, ``[..., 1]`` in float32 or more."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    found = x * scale
    return found.mul_(weight) if x.dtype == found.dtype else found.to(x.dtype) * weight


def _norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` ``[rows, width]`` (added to ``into``, where given) and of ``weight``; ``grad`` is used up."""
    dtype = x.dtype
    grad, unit = grad.to(scale.dtype), x * scale
    product = grad * unit
    weight_grad = product.sum(0).to(weight.dtype)
    along = torch.mv(product, weight.to(scale.dtype)).div_(x.shape[-1]).unsqueeze_(-1)  # [rows, 1]
    grad.mul_(weight).addcmul_(unit, along, value=-1)
    if into is None:
        return grad.mul_(scale).to(dtype), weight_grad
    return into.add_(grad.mul_(scale)) if into.dtype != grad.dtype else into.addcmul_(grad, scale), weight_grad


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = _scale_of(x, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return _normed(x, scale, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return (*_norm_backward(grad.clone(), x, scale, weight, None), None)


# --- norm, query, key and value with their own norms and their rotations: Su et al. 2021 ---


class _Projections(torch.autograd.Function):
    TENSORS = 11  # where those of the linear layers begin

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, epsilon: float, cos: Tensor, sin: Tensor, head_dim: int,
        low: torch.dtype | None, scalings: list[float], query_norm: Tensor | None, key_norm: Tensor | None,
        head_epsilon: float, *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        scale = _scale_of(x, epsilon)
        normed = _normed(x, scale, norm).to(low or x.dtype)
        turn = [part[:, None, : head_dim // 2] for part in (cos, sin)]  # [tokens, 1, half]
        linears = regrouped(tensors, scalings)
        query, key, value = (fused_linear.apply(normed, one, low).view(len(x), -1, head_dim) for one in linears)
        heads = [query, key] if query_norm is not None else [None, None]  # before their norms, which backward needs
        ctx.save_for_backward(x, scale, norm, *turn, query_norm, key_norm, *heads, *tensors)
        ctx.low, ctx.scalings, ctx.head_epsilon = low, scalings, head_epsilon
        if query_norm is not None and key_norm is not None:
            query = _normed(query, _scale_of(query, head_epsilon), query_norm)
            key = _normed(key, _scale_of(key, head_epsilon), key_norm)
        return _rotate(query, turn, 1).to(value.dtype), _rotate(key, turn, 1).to(value.dtype), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _Projections._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm, cos, sin, query_norm, key_norm, query_before, key_before, *tensors = ctx.saved_tensors
        linears, low = regrouped(tensors, ctx.scalings), ctx.low
        turned = [_rotate(grad, (cos, sin), -1) for grad in (query, key)]
        norm_grads: list[Tensor | None] = [None, None]
        if query_norm is not None:
            sides = ((query_before, query_norm), (key_before, key_norm))
            for side, (before, own) in enumerate(sides):
                turned[side], norm_grads[side] = _heads_backward(turned[side], before, own, ctx.head_epsilon)
        flat = [grad.flatten(1).to(value.dtype) for grad in (*turned, value)]
        normed = _normed(x, scale, norm).to(low or x.dtype)
        found: list[Tensor | None] = []
        for place, (grad, linear) in enumerate(zip(flat, linears, strict=True)):
            start = _Projections.TENSORS + SLOTS * place
            found += fused_linear.own_grads(grad, normed, linear, low, ctx.needs_input_grad[start : start + SLOTS])
        into = fused_linear.input_grad(flat, linears, low, x.dtype)
        x_grad, norm_grad = _norm_backward(into, x, scale, norm, None)
        return (x_grad, norm_grad, *[None] * 6, *norm_grads, None, *found)


def _heads_backward(grad: Tensor, before: Tensor, norm: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Through the norm of each head: gradients of its input, ``[tokens, heads, head_dim]``, and its weight."""
    rows = before.reshape(-1, before.shape[-1])
    found, norm_grad = _norm_backward(grad.reshape_as(rows), rows, _scale_of(rows, epsilon), norm, None)
    return found.view_as(before), norm_grad


def _rotate(x: Tensor, turn: Any, sign: int) -> Tensor:
    """Turn the two halves of each head, ``[tokens, heads, head_dim]``, by the position's angles, or back."""
    cos, sin = turn
    half = x.shape[-1] // 2
    if x.dtype != cos.dtype:
        x = x.to(cos.dtype)
    left, right = x[..., :half], x[..., half:]
    turned = torch.empty_like(x)
    torch.mul(left, cos, out=turned[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=turned[..., half:]).addcmul_(left, sin, value=sign)
    return turned


# --- the output of attention, its residual, and the gated MLP: Shazeer 2020 ---


class _Rest(torch.autograd.Function):
    TENSORS = 7  # where those of the linear layers begin

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, norm: Tensor, epsilon: float, low: torch.dtype | None,
        scalings: list[float], keeps_mlp: bool, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, gates, ups, down = regrouped(tensors, scalings)
        middle = fused_linear.apply(attended, out, low, onto=x)
        scale = _scale_of(middle, epsilon)
        normed = _normed(middle, scale, norm).to(low or middle.dtype)
        gate, up = fused_linear.apply(normed, gates, low), fused_linear.apply(normed, ups, low)
        kept = (gate, up) if keeps_mlp else (None, None)
        ctx.save_for_backward(attended, middle, scale, norm, *kept, *tensors)
        ctx.low, ctx.scalings = low, scalings
        return fused_linear.apply(nn.functional.silu(gate).mul_(up), down, low, onto=middle)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast("cpu", enabled=False):
            return _Rest._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, middle, scale, norm, gate, up, *tensors = ctx.saved_tensors
        linears, low = regrouped(tensors, ctx.scalings), ctx.low
        out, gates, ups, down = linears
        starts = range(_Rest.TENSORS, _Rest.TENSORS + SLOTS * len(linears), SLOTS)
        wants = [ctx.needs_input_grad[start : start + SLOTS] for start in starts]
        normed = _normed(middle, scale, norm).to(low or middle.dtype)
        if gate is None:
            gate, up = fused_linear.apply(normed, gates, low), fused_linear.apply(normed, ups, low)
        act = nn.functional.silu(gate)
        outer = grad.to(low or grad.dtype)
        of_down = fused_linear.own_grads(outer, act * up, down, low, wants[3])
        inner = fused_linear.input_grad([outer], [down], low, gate.dtype)
        up_grad = act.mul_(inner)
        gate_grad = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        of_gate = fused_linear.own_grads(gate_grad, normed, gates, low, wants[1])
        of_up = fused_linear.own_grads(up_grad, normed, ups, low, wants[2])
        into = fused_linear.input_grad([gate_grad, up_grad], [gates, ups], low, middle.dtype)
        middle_grad, norm_grad = _norm_backward(into, middle, scale, norm, grad.clone())
        outer = middle_grad.to(low or middle_grad.dtype)
        of_out = fused_linear.own_grads(outer, attended, out, low, wants[0])
        attended_grad = fused_linear.input_grad([outer], [out], low, attended.dtype)
        return (middle_grad, attended_grad, norm_grad, *[None] * 4, *of_out, *of_gate, *of_up, *of_down)
