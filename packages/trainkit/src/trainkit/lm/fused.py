"""The layers of Llama, Mistral and Qwen2 for full fine-tuning on a CPU: fewer passes over memory, the same numbers.

A layer is two autograd functions with attention between them. Each keeps only what its backward pass cannot cheaply
compute again (norms and activations are), adds residuals inside the matrix product, and works in place. In float32 the
results differ from transformers' own layers by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainkit.lm.attention import Documents, attend_by_document

BACKBONES = {"LlamaModel", "MistralModel", "Qwen2Model"}
SILU = {"silu", "swish"}


def can_fuse(backbone: Any) -> bool:
    """Whether ``backbone`` is made of layers that ``fused_backbone`` computes exactly as they are written.

    Adapters, hooks, quantized or replaced layers, dropout, other devices than the CPU and autocast are reasons not to.
    """
    if type(backbone).__name__ not in BACKBONES or torch.is_autocast_enabled("cpu"):
        return False
    config: Any = backbone.config
    if config.hidden_act not in SILU or (backbone.training and getattr(config, "attention_dropout", 0.0)):
        return False
    parts = [backbone, backbone.norm, *backbone.layers.modules()]  # those that are not called here; the others are
    plain = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    linears = [part for name, part in backbone.named_modules() if name.rpartition(".")[2] in plain]
    return (
        len(linears) == len(plain) * len(backbone.layers)
        and all(type(part) is nn.Linear for part in linears)
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
    embedded = backbone.embed_tokens(input_ids)
    cos, sin = (part[0] for part in backbone.rotary_emb(embedded, position_ids=position_ids))
    states = embedded[0]
    recompute = backbone.training and getattr(backbone, "gradient_checkpointing", False)
    for layer in backbone.layers[: backbone.config.num_hidden_layers]:
        window = getattr(layer.self_attn, "sliding_window", getattr(backbone.config, "sliding_window", None))
        if recompute:
            states = checkpoint(_layer, layer, states, cos, sin, documents, window, use_reentrant=False)
        else:
            states = _layer(layer, states, cos, sin, documents, window)
    found: Tensor = _FinalNorm.apply(  # type: ignore[no-untyped-call]
        states, backbone.norm.weight, backbone.norm.variance_epsilon
    )
    return found


def _layer(layer: Any, states: Tensor, cos: Tensor, sin: Tensor, documents: Documents, window: int | None) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    query, key, value = _Projections.apply(  # type: ignore[no-untyped-call]
        states, before.weight, before.variance_epsilon, cos, sin, attention.head_dim,
        *_weights(attention.q_proj, attention.k_proj, attention.v_proj),
    )  # fmt: skip
    attended = attend_by_document(query, key, value, documents, scale=attention.scaling, window=window)
    found: Tensor = _Rest.apply(  # type: ignore[no-untyped-call]
        states, attended.flatten(1), after.weight, after.variance_epsilon,
        *_weights(attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )  # fmt: skip
    return found


def _weights(*linears: nn.Linear) -> list[Tensor | None]:
    return [part for linear in linears for part in (linear.weight, linear.bias)]


# --- the norm: Zhang and Sennrich 2019 ---


def _scale_of(x: Tensor, epsilon: float) -> Tensor:
    """``1 / rms`` of each row, ``[tokens, 1]``."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)


def _norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (added to ``into``, where given) and of ``weight``; ``grad`` is used up."""
    unit = x * scale
    product = grad * unit
    weight_grad = product.sum(0)
    along = torch.mv(product, weight).div_(x.shape[-1]).unsqueeze_(-1)  # [tokens, 1]
    grad.mul_(weight).addcmul_(unit, along, value=-1)
    if into is None:
        return grad.mul_(scale), weight_grad
    return into.addcmul_(grad, scale), weight_grad


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = _scale_of(x, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, weight = ctx.saved_tensors
        return (*_norm_backward(grad.clone(), x, scale, weight, None), None)


# --- norm, query, key and value with their rotations: Su et al. 2021 ---


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, epsilon: float, cos: Tensor, sin: Tensor, head_dim: int,
        wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None, wv: Tensor, bv: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        scale = _scale_of(x, epsilon)
        normed = (x * scale).mul_(norm)
        half = head_dim // 2
        turn = cos[:, None, :half], sin[:, None, :half]  # [tokens, 1, half]
        query, key, value = (
            nn.functional.linear(normed, w, b).view(len(x), -1, head_dim) for w, b in ((wq, bq), (wk, bk), (wv, bv))
        )
        ctx.save_for_backward(x, scale, norm, *turn, wq, wk, wv)
        ctx.has_bias = [b is not None for b in (bq, bk, bv)]
        return _rotate(query, *turn, 1), _rotate(key, *turn, 1), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm, cos, sin, *weights = ctx.saved_tensors
        query, key, value = grads
        flat = [_rotate(query, cos, sin, -1).flatten(1), _rotate(key, cos, sin, -1).flatten(1), value.flatten(1)]
        normed = (x * scale).mul_(norm)
        found: list[Tensor | None] = []
        for index, (grad, has_bias) in enumerate(zip(flat, ctx.has_bias, strict=True)):
            found += _linear_grads(ctx, 6 + 2 * index, grad, normed, has_bias)
        into = _input_grad(flat, weights)
        x_grad, norm_grad = _norm_backward(into, x, scale, norm, None)
        return (x_grad, norm_grad, None, None, None, None, *found)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Turn the two halves of each head, ``[tokens, heads, head_dim]``, by the position's angles, or back."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    turned = torch.empty_like(x)
    torch.mul(left, cos, out=turned[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=turned[..., half:]).addcmul_(left, sin, value=sign)
    return turned


# --- the output of attention, its residual, and the gated MLP: Shazeer 2020 ---


class _Rest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, norm: Tensor, epsilon: float,
        wo: Tensor, bo: Tensor | None, wg: Tensor, bg: Tensor | None, wu: Tensor, bu: Tensor | None,
        wd: Tensor, bd: Tensor | None,
    ) -> Tensor:  # fmt: skip
        middle = _add_linear(x, attended, wo, bo)
        scale = _scale_of(middle, epsilon)
        normed = (middle * scale).mul_(norm)
        gate, up = nn.functional.linear(normed, wg, bg), nn.functional.linear(normed, wu, bu)
        ctx.save_for_backward(attended, middle, scale, norm, gate, up, wo, wg, wu, wd)
        ctx.has_bias = [b is not None for b in (bo, bg, bu, bd)]
        return _add_linear(middle, nn.functional.silu(gate).mul_(up), wd, bd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        attended, middle, scale, norm, gate, up, wo, wg, wu, wd = ctx.saved_tensors
        of_o, of_gate, of_up, of_down = ctx.has_bias
        act = nn.functional.silu(gate)
        down = _linear_grads(ctx, 10, grad, act * up, of_down)
        inner = grad @ wd
        up_grad = act.mul_(inner)
        gate_grad = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        normed = (middle * scale).mul_(norm)
        gates = _linear_grads(ctx, 6, gate_grad, normed, of_gate)
        ups = _linear_grads(ctx, 8, up_grad, normed, of_up)
        into = _input_grad([gate_grad, up_grad], [wg, wu])
        middle_grad, norm_grad = _norm_backward(into, middle, scale, norm, grad.clone())
        outs = _linear_grads(ctx, 4, middle_grad, attended, of_o)
        return (middle_grad, middle_grad @ wo, norm_grad, None, *outs, *gates, *ups, *down)


def _add_linear(x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    added = torch.addmm(x, inner, weight.t())
    return added if bias is None else added.add_(bias)


def _linear_grads(ctx: Any, place: int, grad: Tensor, inner: Tensor, has_bias: bool) -> list[Tensor | None]:
    """Gradients of a weight and its bias, where they are wanted."""
    weight = grad.t() @ inner if ctx.needs_input_grad[place] else None
    return [weight, grad.sum(0) if has_bias and ctx.needs_input_grad[place + 1] else None]


def _input_grad(grads: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)
    return total
