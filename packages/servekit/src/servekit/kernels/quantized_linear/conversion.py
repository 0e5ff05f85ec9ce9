"""int4 checkpoints of others in our layout: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from common_platform.errors import ConfigError
from servekit.kernels.quantized_linear.weights import Int4Weight, pack_int4

PER_WORD = 8  # nibbles of an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight lies in each nibble, from the lowest


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, zeros_are_one_less: bool = True
) -> Int4Weight:
    """A GPTQ matrix (Frantar et al., ICLR 2023), as AutoGPTQ and GPTQModel store it.

    Args:
        qweight: ``[in / 8, out]`` int32; nibble ``i`` of word ``r`` is input row ``8 r + i``.
        qzeros: ``[groups, out / 8]`` int32; nibble ``i`` of word ``c`` is column ``8 c + i``.
        scales: ``[groups, out]`` float16.
        g_idx: ``[in]``, the group of each input row; not in order when quantized with ``desc_act``.
        zeros_are_one_less: ``qzeros`` hold the zero minus one (checkpoint format 1), not the zero itself (``gptq_v2``).
    """
    nibbles = _nibbles(qweight, 0)  # [in, out]
    zeros = _nibbles(qzeros, 1)
    if zeros_are_one_less:
        zeros = (zeros + 1) & 15
    order = None
    if g_idx is not None and bool((g_idx[1:] < g_idx[:-1]).any()):
        order = torch.argsort(g_idx, stable=True)
        nibbles = nibbles[order]
    group = _group_size(len(nibbles), len(scales))
    _check_groups(g_idx, order, group)
    return pack_int4(nibbles.t(), scales, _none_if_middle(zeros), group, order)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
    """An AWQ matrix (Lin et al., MLSys 2024), as AutoAWQ's ``gemm`` version stores it.

    Args:
        qweight: ``[in, out / 8]`` int32, eight columns a word in the order ``AWQ_ORDER``.
        qzeros: ``[groups, out / 8]`` int32, likewise.
        scales: ``[groups, out]`` float16.
    """
    nibbles, zeros = _awq_columns(qweight), _awq_columns(qzeros)
    return pack_int4(nibbles.t(), scales, _none_if_middle(zeros), _group_size(len(nibbles), len(scales)))


def from_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: tuple[int, int],
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
) -> Int4Weight:
    """A matrix in compressed-tensors' ``pack-quantized`` form.

    Args:
        weight_packed: ``[out, ceil(in / 8)]`` int32; nibble ``i`` of word ``c`` is input column ``8 c + i``, as the
            signed value plus 8.
        weight_scale: ``[out, groups]``.
        weight_shape: ``(out, in)``.
        weight_zero_point: ``[ceil(out / 8), groups]`` int32, packed along ``out``, plus 8; None when symmetric.
        weight_g_idx: ``[in]``, or None; -1 everywhere also means that groups are in order.
    """
    out, width = weight_shape
    nibbles = _nibbles(weight_packed, 1)[:, :width]
    zeros = None if weight_zero_point is None else _none_if_middle(_nibbles(weight_zero_point, 0)[:out].t())
    order = None
    if weight_g_idx is not None and bool((weight_g_idx[1:] < weight_g_idx[:-1]).any()):
        order = torch.argsort(weight_g_idx, stable=True)
        nibbles = nibbles[:, order]
    group = _group_size(width, weight_scale.shape[1])
    _check_groups(weight_g_idx, order, group)
    return pack_int4(nibbles, weight_scale.t(), zeros, group, order)


def _nibbles(words: Tensor, dim: int) -> Tensor:
    """Each int32 becomes eight uint8 along ``dim``, the lowest bits first."""
    shifts = torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=words.device)
    parts = (words.to(torch.int32).unsqueeze(-1) >> shifts) & 15  # [rows, cols, 8]
    if dim == 0:
        parts = parts.transpose(1, 2)
    shape = (words.shape[0] * PER_WORD, words.shape[1]) if dim == 0 else (words.shape[0], words.shape[1] * PER_WORD)
    return parts.reshape(shape).to(torch.uint8)


def _awq_columns(words: Tensor) -> Tensor:
    place = torch.tensor(AWQ_ORDER, device=words.device).argsort()  # the nibble of each of eight columns
    stored = _nibbles(words, 1).view(len(words), -1, PER_WORD)
    return stored[:, :, place].reshape(len(words), -1)


def _none_if_middle(zeros: Tensor) -> Tensor | None:
    return None if bool((zeros == 8).all()) else zeros


def _group_size(width: int, groups: int) -> int:
    """The checkpoint's own group size: a multiple of 32, the last group perhaps short."""
    if groups == 1:
        return width
    for group in (32, 64, 128):
        if -(-width // group) == groups:
            return group
    raise ConfigError("quantization.group_size", f"{width} columns in {groups} groups", "groups of 32, 64 or 128")


def _check_groups(g_idx: Tensor | None, order: Tensor | None, group: int) -> None:
    """Once in order, column ``c`` must be of group ``c // group``: kernels look nowhere else."""
    if g_idx is None or bool((g_idx < 0).all()):
        return
    ordered = g_idx if order is None else g_idx[order]
    places = torch.arange(len(ordered), device=ordered.device) // group
    if not torch.equal(ordered.long(), places):
        raise ConfigError("quantization.g_idx", "groups of different sizes", f"{group} columns in each group")
