"""Products with weights of few bits, in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.quantize.reference import quantize
from servekit.kernels.quantized_linear.weights import BLOCK, MIDDLE, BlockWeight, ChannelWeight, Int4Weight, unpack_int4


def w8a8_linear(x: Tensor, weight: ChannelWeight, bias: Tensor | None = None) -> Tensor:
    """Eight-bit activations times eight-bit weights; a scale for each token and for each output channel.

    Args:
        x: ``[tokens, in]``, float32, bfloat16 or float16; quantized here to the dtype of the weight.
        weight: int8 (sums are exact int32) or float8 (sums are float32).
        bias: ``[out]``, or None.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.

    Source: Xiao et al., "SmoothQuant", ICML 2023 (int8); Micikevicius et al., "FP8 formats", 2022.
    """
    values, scales = quantize(x, weight.values.dtype, x.shape[1])
    return w8a8_product(values, scales, weight, bias, x.dtype)


def w8a8_product(
    values: Tensor, scales: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``w8a8_linear`` of tokens already quantized: ``values`` ``[tokens, in]``, ``scales`` ``[tokens, 1]`` float32."""
    if weight.values.dtype == torch.int8:  # float64 holds sums of int8 products exactly
        total = (values.double() @ weight.values.double().t()).float()
    else:
        total = values.float() @ weight.values.float().t()
    out = total * scales * weight.scales
    return (out if bias is None else out + bias.float()).to(dtype)


def w8a16_linear(x: Tensor, weight: ChannelWeight, bias: Tensor | None = None) -> Tensor:
    """Activations as they are times eight-bit weights: ``[tokens, in]`` -> ``[tokens, out]``."""
    out = x.float() @ weight.values.float().t() * weight.scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


def fp8_block_linear(x: Tensor, weight: BlockWeight, bias: Tensor | None = None) -> Tensor:
    """float8 in groups of 128 columns of a token times float8 in blocks of 128 x 128.

    Args:
        x: ``[tokens, in]``, float32, bfloat16 or float16; quantized here.
        weight: its blocks begin at row and column 0; the last ones may be short.
        bias: ``[out]``, or None.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``; products of 128 columns are summed, scaled, and summed in float32.

    Source: DeepSeek-V3 technical report, 2024, 3.3.
    """
    values, scales = quantize(x, weight.values.dtype, BLOCK)
    return fp8_block_product(values, scales, weight, bias, x.dtype)


def fp8_block_product(
    values: Tensor, scales: Tensor, weight: BlockWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``fp8_block_linear`` of tokens already quantized: ``scales`` is ``[tokens, ceil(in / 128)]`` float32."""
    spread = scales.repeat_interleave(BLOCK, dim=1)[:, : values.shape[1]]
    out = (values.float() * spread) @ dequantize_blocks(weight).t()
    return (out if bias is None else out + bias.float()).to(dtype)


def w4a16_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Activations as they are times int4 weights in groups.

    Args:
        x: ``[tokens, in]``, float32, bfloat16 or float16.
        weight: see ``Int4Weight`` for the layout; ``conversion`` makes it from other people's.
        bias: ``[out]``, or None.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``; the arithmetic is float32.

    Source: Frantar et al., "GPTQ", ICLR 2023; Lin et al., "AWQ", MLSys 2024.
    """
    if weight.order is not None:
        x = x[:, weight.order]
    out = x.float() @ dequantize_int4(weight).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def dequantize_blocks(weight: BlockWeight) -> Tensor:
    """``[out, in]`` float32."""
    out, width = weight.values.shape
    spread = weight.scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return weight.values.float() * spread[:out, :width]


def dequantize_int4(weight: Int4Weight) -> Tensor:
    """``[out, in]`` float32, columns in the order in which they are stored."""
    group_of = torch.arange(weight.in_features, device=weight.packed.device) // weight.group
    scales = weight.scales.float().t()[:, group_of]
    zeros = MIDDLE if weight.zeros is None else weight.zeros.t()[:, group_of].float()
    return (unpack_int4(weight).float() - zeros) * scales
