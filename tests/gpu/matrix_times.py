"""What is timed beside attention and sampling: few bits, experts, latent and shared attention, training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from servekit.kernels.fused_moe.experts import BlockExperts, DenseExperts, ExpertWeights, Int4Experts
from servekit.kernels.moe_routing import Routing
from servekit.kernels.quantized_linear.weights import BlockWeight, ChannelWeight, Int4Weight

Call = Callable[[], Any]
Row = tuple[str, Callable[[], Call], int, int, str, float]  # name, make, bytes, flops, bound, target
GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSizes:
    """Serving sizes, or tiny ones to try the script itself."""

    few: int = 16
    many: int = 4096
    out: int = 14336
    width: int = 4096
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    inner: int = 768
    rows: int = 64
    context: int = 4096
    heads: int = 32
    latent: int = 512
    rope: int = 64
    prefix: int = 8192
    own: int = 256
    vocab: int = 128256
    parameters: int = 50_000_000


SERVING = MatrixSizes()
TINY = MatrixSizes(
    few=2, many=20, out=32, width=128, experts=4, top_k=2, hidden=128, inner=128, rows=2, context=40, heads=4,
    latent=32, rope=16, prefix=40, own=8, vocab=300, parameters=3000,
)  # fmt: skip


def matrix_rows(device: torch.device, *, is_dry: bool) -> list[Row]:
    """What ``kernel_times`` makes its cases of."""
    sizes = TINY if is_dry else SERVING
    dtype = torch.float32 if is_dry else torch.bfloat16
    return [
        *_linear_rows(sizes, device, dtype),
        *_moe_rows(sizes, device, dtype),
        *_attention_rows(sizes, device, dtype),
        *_training_rows(sizes, device, dtype),
    ]


def _eight_bits(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random finite numbers, made eight bits at a time: a whole layer in float32 would not fit beside itself."""
    numbers = torch.randint(-100, 100, shape, dtype=torch.int8, device=device)
    if dtype == torch.int8:
        return numbers
    return (numbers.view(torch.uint8) & 0xBF).view(dtype)  # no exponent so high that it is not a number


def _linear_rows(s: MatrixSizes, device: torch.device, dtype: torch.dtype) -> list[Row]:
    from servekit.kernels.quantized_linear import triton_backend as linear

    spans = -(-s.width // 128)
    ones = {"device": device, "dtype": torch.float32}

    def w8a8(tokens: int, kind: torch.dtype) -> Call:
        weight = ChannelWeight(_eight_bits(s.out, s.width, dtype=kind, device=device), torch.ones(s.out, **ones))
        x = _eight_bits(tokens, s.width, dtype=kind, device=device)
        scales = torch.ones(tokens, 1, **ones)
        return lambda: linear.w8a8_product(x, scales, weight, None, dtype)

    def blocks(tokens: int) -> Call:
        kind = torch.float8_e4m3fn
        scales = torch.ones(-(-s.out // 128), spans, **ones)
        weight = BlockWeight(_eight_bits(s.out, s.width, dtype=kind, device=device), scales)
        x, x_scales = _eight_bits(tokens, s.width, dtype=kind, device=device), torch.ones(tokens, spans, **ones)
        return lambda: linear.fp8_block_product(x, x_scales, weight, None, dtype)

    def int4(tokens: int) -> Call:
        packed = torch.randint(0, 256, (spans * 64, s.out), dtype=torch.uint8, device=device)
        scales = torch.ones(-(-s.width // GROUP), s.out, device=device, dtype=dtype)
        x = torch.randn(tokens, s.width, device=device).to(dtype)
        return lambda: linear.w4a16_linear(x, Int4Weight(packed, scales, None, GROUP, s.width))

    rows: list[Row] = []
    for tokens in (1, s.few, s.many):
        flops = 2 * tokens * s.out * s.width
        bound, target = ("bandwidth", 0.75) if tokens <= 16 and tokens != s.many else ("tensor cores", 0.5)
        eight = s.out * s.width + tokens * (s.width + 2 * s.out)
        four = int(s.out * s.width * (0.5 + 2 / GROUP)) + tokens * 2 * (s.width + s.out)
        for name, make, moved in (
            ("int8", lambda t=tokens: w8a8(t, torch.int8), eight),
            ("fp8", lambda t=tokens: w8a8(t, torch.float8_e4m3fn), eight),
            ("fp8 blocks", lambda t=tokens: blocks(t), eight),
            ("int4", lambda t=tokens: int4(t), four),
        ):
            rows.append((f"linear {name}, {tokens} tokens", make, moved, flops, bound, target))
    return rows


def _moe_rows(s: MatrixSizes, device: torch.device, dtype: torch.dtype) -> list[Row]:
    from servekit.kernels.fused_moe import sorted as loop
    from servekit.kernels.fused_moe import triton_backend as moe
    from servekit.kernels.moe_routing import triton_backend as routing

    def experts(kind: str, out: int, width: int, parts: int) -> ExpertWeights:
        shape = (s.experts, out, width)
        if kind == "bf16":
            return DenseExperts(torch.randn(shape, device=device, dtype=dtype) * width**-0.5)
        if kind == "fp8 blocks":
            blocks = (s.experts, parts * -(-out // parts // 128), -(-width // 128))
            values = _eight_bits(*shape, dtype=torch.float8_e4m3fn, device=device)
            return BlockExperts(values, torch.full(blocks, 1e-2, device=device), parts)
        packed = torch.randint(0, 256, (s.experts, -(-width // 128) * 64, out), dtype=torch.uint8, device=device)
        scales = torch.full((s.experts, -(-width // GROUP), out), 1e-2, device=device, dtype=dtype)
        return Int4Experts(packed, scales, None, GROUP, width)

    def layer(tokens: int, kind: str, module: Any) -> Call:
        gate_up, down = experts(kind, 2 * s.inner, s.hidden, 2), experts(kind, s.hidden, s.inner, 1)
        x = torch.randn(tokens, s.hidden, device=device).to(dtype)
        logits = torch.randn(tokens, s.experts, device=device)
        weights, chosen = routing.route(logits, Routing(num_experts=s.experts, top_k=s.top_k))
        return lambda: module.fused_moe(x, chosen, weights, gate_up, down)

    rows: list[Row] = []
    for tokens in (1, 4 * s.few, s.many):
        met = s.experts * (1 - (1 - s.top_k / s.experts) ** tokens)
        activations = tokens * 2 * (2 * s.hidden + 2 * s.top_k * (s.inner + s.hidden))
        flops = tokens * s.top_k * 6 * s.hidden * s.inner
        bound, target = ("tensor cores", 0.4) if tokens == s.many else ("bandwidth", 0.6)
        for kind, size in (("bf16", 2.0), ("fp8 blocks", 1.0), ("int4", 0.5 + 2 / GROUP)):
            moved = int(met * 3 * s.hidden * s.inner * size) + activations
            make = lambda t=tokens, k=kind: layer(t, k, moe)  # noqa: E731 - one of a table
            rows.append((f"experts {kind}, {tokens} tokens", make, moved, flops, bound, target))
        moved = int(met * 3 * s.hidden * s.inner * 2) + activations
        make = lambda t=tokens: layer(t, "bf16", loop)  # noqa: E731 - one of a table
        rows.append((f"experts bf16 by a loop of torch, {tokens} tokens (to compare)", make, moved, flops, bound, 0.0))
    return rows


def _attention_rows(s: MatrixSizes, device: torch.device, dtype: torch.dtype) -> list[Row]:
    from servekit.kernels.cascade_attention import triton_backend as cascade
    from servekit.kernels.mla_decode import triton_backend as mla

    size = 16  # tokens of a block
    width, kv_heads = s.latent + s.rope, max(s.heads // 4, 1)
    head_dim = 16 if s.context < 100 else 128

    def tables(count: int) -> Tensor:
        return (torch.randperm(s.rows * count, device=device) + 1).view(s.rows, count).to(torch.int32)

    def latent() -> Call:
        count = -(-s.context // size)
        cache = torch.randn(s.rows * count + 1, size, width, device=device, dtype=dtype)
        query = torch.randn(s.rows, s.heads, width, device=device, dtype=dtype)
        contexts, blocks = torch.full((s.rows,), s.context, dtype=torch.int32, device=device), tables(count)
        return lambda: mla.mla_decode(query, cache, blocks, contexts, s.latent, width**-0.5)

    def shared() -> Call:
        first, own = -(-s.prefix // size), -(-s.own // size)
        mine = tables(own) + first
        whole = torch.cat((torch.arange(1, first + 1, device=device).expand(s.rows, -1), mine), dim=1)
        cache = torch.randn(2, first + s.rows * own + 1, size, kv_heads, head_dim, device=device, dtype=dtype)
        query = torch.randn(s.rows, s.heads, head_dim, device=device, dtype=dtype)
        contexts = torch.full((s.rows,), first * size + s.own, dtype=torch.int32, device=device)
        blocks = whole.to(torch.int32).contiguous()
        return lambda: cascade.cascade_attention(query, cache, blocks, contexts, first * size, head_dim**-0.5)

    element = dtype.itemsize
    latent_bytes = element * (s.rows * s.context * width + s.rows * s.heads * (width + s.latent))
    latent_flops = 2 * s.rows * s.context * s.heads * (width + s.latent)
    shared_bytes = element * ((s.prefix + s.rows * s.own) * 2 * kv_heads + 2 * s.rows * s.heads) * head_dim
    shared_flops = 4 * s.rows * (s.prefix + s.own) * s.heads * head_dim
    return [
        (f"latent attention, {s.rows} rows x {s.context}", latent, latent_bytes, latent_flops, "bandwidth", 0.6),
        (
            f"attention, {s.rows} rows, {s.prefix} shared and {s.own} own",
            shared,
            shared_bytes,
            shared_flops,
            "bandwidth",
            0.5,
        ),
    ]


def _training_rows(s: MatrixSizes, device: torch.device, dtype: torch.dtype) -> list[Row]:
    from trainkit.kernels import linear_cross_entropy, rms_norm, swiglu
    from trainkit.kernels.adamw import triton_backend as adamw
    from trainkit.kernels.adamw.group import Rates, Tensors

    tokens = s.many

    def with_gradients(call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Call:
        given = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
        return lambda: torch.autograd.grad(call(*given).sum(), given)

    def loss() -> Call:
        targets = torch.randint(0, s.vocab, (tokens,), device=device)
        return with_gradients(
            lambda hidden, weight: linear_cross_entropy(hidden, weight, targets), (tokens, s.width), (s.vocab, s.width)
        )

    def step() -> Call:
        parts = [[torch.randn(s.parameters // 10, device=device) for _ in range(10)] for _ in range(3)]
        squares = [torch.rand(s.parameters // 10, device=device) for _ in range(10)]
        tensors = Tensors(parts[0], parts[1], parts[2], squares, [5] * 10)
        rates = Rates(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
        return lambda: adamw.adamw_step(tensors, rates)

    element = dtype.itemsize
    loss_flops = 8 * tokens * s.vocab * s.width
    norm_bytes, gate_bytes = 5 * tokens * s.width * element, 8 * tokens * s.out * element
    normed: Callable[[], Call] = lambda: with_gradients(  # noqa: E731 - one of a table
        lambda x, weight: rms_norm(x, weight, 1e-5), (tokens, s.width), (s.width,)
    )
    gated: Callable[[], Call] = lambda: with_gradients(swiglu, (tokens, s.out), (tokens, s.out))  # noqa: E731
    return [
        (f"loss of a head of {s.vocab}, both passes", loss, 0, loss_flops, "tensor cores", 0.5),
        ("training RMSNorm, both passes", normed, norm_bytes, 0, "bandwidth", 0.5),
        ("training SwiGLU, both passes", gated, gate_bytes, 0, "bandwidth", 0.6),
        ("AdamW, float32", step, 7 * 4 * s.parameters, 0, "bandwidth", 0.8),
    ]
