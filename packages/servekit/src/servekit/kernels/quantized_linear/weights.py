"""Weights of few bits, in the layouts that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common_platform.errors import ConfigError

SPAN = 128  # columns of an int4 matrix that are packed together
HALF = SPAN // 2
BLOCK = 128  # side of a float8 block that has one scale
MIDDLE = 8  # the zero of symmetric int4
INT4_GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True, eq=False)
class ChannelWeight:
    """Eight bits with a scale for each row (output channel).

    ``values``: ``[out, in]`` int8 or float8; ``scales``: ``[out]`` float32.
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """float8 with a scale for each block of 128 x 128 (DeepSeek-V3 report, 2024, 3.3.2).

    ``values``: ``[out, in]`` float8; ``scales``: ``[ceil(out / 128), ceil(in / 128)]`` float32, which multiply.
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """Four bits, with a scale and perhaps a zero for each group of input columns of a row.

    ``packed``: ``[ceil(in / 128) * 64, out]`` uint8. Row ``64 * s + j`` holds input column ``128 * s + j`` in its low
    bits and column ``128 * s + 64 + j`` in its high bits, so a tile of bytes is two tiles of columns with nothing to
    shuffle. Columns past ``in`` hold the zero. ``scales``: ``[ceil(in / group), out]``, the dtype of activations or
    float32. ``zeros``: ``[ceil(in / group), out]`` uint8, or None: 8 everywhere. The weight is ``(nibble - zero) *
    scale``. ``order``: ``[in]`` int64 or None: which input feature each column multiplies (GPTQ's ``desc_act``).
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    in_features: int
    order: Tensor | None = None


def pack_int4(
    nibbles: Tensor, scales: Tensor, zeros: Tensor | None, group: int, order: Tensor | None = None
) -> Int4Weight:
    """Pack ``[out, in]`` values 0..15; ``scales`` and ``zeros`` are ``[ceil(in / group), out]``.

    Raises:
        ConfigError: ``group`` is not one that the kernels read, or the scales do not fit the groups.
    """
    out, width = nibbles.shape
    if group not in INT4_GROUPS and group < width:
        raise ConfigError("quantization.group_size", group, f"one of {INT4_GROUPS}, or all {width} columns")
    expected = (-(-width // group), out)
    for name, part in (("scales", scales), ("zeros", zeros)):
        if part is not None and tuple(part.shape) != expected:
            raise ConfigError(f"quantization.{name}", tuple(part.shape), f"shape {expected}")
    spans = -(-width // SPAN)
    middle = torch.full((out, spans * SPAN - width), MIDDLE, dtype=torch.uint8, device=nibbles.device)
    if zeros is not None and middle.numel():
        middle = zeros[-1].to(torch.uint8)[:, None].expand_as(middle)
    whole = torch.cat((nibbles.to(torch.uint8), middle), dim=1).view(out, spans, 2, HALF)
    packed = whole[:, :, 0] | (whole[:, :, 1] << 4)
    return Int4Weight(
        packed.reshape(out, spans * HALF).t().contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.to(torch.uint8).contiguous(),
        group,
        width,
        order,
    )


def unpack_int4(weight: Int4Weight) -> Tensor:
    """The values 0..15, ``[out, in]`` uint8."""
    rows = weight.packed.t()
    spans = rows.reshape(len(rows), -1, HALF)
    whole = torch.stack((spans & 15, spans >> 4), dim=2).reshape(len(rows), -1)
    return whole[:, : weight.in_features].contiguous()


def quantize_channels(weight: Tensor, dtype: torch.dtype) -> ChannelWeight:
    """Round ``[out, in]`` to int8 or float8 with a scale for each row."""
    from servekit.kernels.quantize.reference import quantize

    values, scales = quantize(weight, dtype, weight.shape[1])
    return ChannelWeight(values, scales[:, 0].contiguous())


def quantize_blocks(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> BlockWeight:
    """Round ``[out, in]`` to float8 with a scale for each block of 128 x 128."""
    from servekit.kernels.quantize.reference import LARGEST, SMALLEST

    out, width = weight.shape
    tall, wide = -(-out // BLOCK), -(-width // BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, wide * BLOCK - width, 0, tall * BLOCK - out))
    blocks = padded.view(tall, BLOCK, wide, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(SMALLEST) / LARGEST[dtype]
    values = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:out, :width]
    return BlockWeight(values.to(dtype).contiguous(), scales)


def quantize_int4(weight: Tensor, group: int, *, symmetric: bool = True) -> Int4Weight:
    """Round ``[out, in]`` to four bits, each group of a row by its own range."""
    out, width = weight.shape
    num_groups = -(-width // group)
    padded = torch.nn.functional.pad(weight.float(), (0, num_groups * group - width)).view(out, num_groups, group)
    if symmetric:
        scales = padded.abs().amax(dim=-1).clamp_min(1e-10) / 7
        zeros = torch.full_like(scales, MIDDLE)
    else:
        low, high = padded.amin(dim=-1).clamp_max(0), padded.amax(dim=-1).clamp_min(0)
        scales = (high - low).clamp_min(1e-10) / 15
        zeros = (-low / scales).round().clamp(0, 15)
    nibbles = (padded / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return pack_int4(
        nibbles.view(out, -1)[:, :width],
        scales.t().to(weight.dtype),
        None if symmetric else zeros.t(),
        group,
    )


def as_fnuz(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn as the float8_e4m3fnuz that MI300 multiplies: the same bits mean half as much there.

    The one pattern that differs otherwise, minus zero, is not a number in that form and becomes zero.
    """
    bits = values.view(torch.uint8)
    bits = torch.where(bits == 0x80, torch.zeros_like(bits), bits)
    return bits.view(torch.float8_e4m3fnuz), scales * 2
