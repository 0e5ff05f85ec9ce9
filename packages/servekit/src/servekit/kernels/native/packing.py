"""Weights in the order in which the kernels read them: panels of 64 columns, each contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from servekit.kernels.native.library import CMatrix, Format, Library, Pool

PANEL = 64
I8_GROUP = 64  # activations that share a scale beside weights of 8 bits
I4_GROUP = 32  # weights, and the activations beside them, that share a scale
HALF = PANEL // 2


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix ``[out, in]``; ``data``, ``scales`` and ``bias`` are what ``matrix`` points to."""

    matrix: CMatrix
    format: Format
    in_features: int
    data: np.ndarray
    scales: np.ndarray | None
    bias: np.ndarray | None


def pack(
    library: Library,
    pool: Pool,
    format: Format,
    parts: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    *,
    gated: bool = False,
) -> PackedWeight:
    """Pack matrices of one width, one below the other.

    Args:
        parts: ``[rows, in]`` each, float32, bfloat16 or float16; may be mapped from a file.
        bias: ``[rows]`` each, or none.
        gated: two parts of one size, gate and up: 32 rows of each in turn, as the SwiGLU epilogue wants them.
    """
    sources = [_readable(part) for part in parts]
    width = sources[0].shape[1]
    places = np.concatenate([_addresses(source) for source in sources])
    order = _gated(len(sources[0])) if gated else np.arange(len(places))
    order = np.concatenate((order, np.full(-len(order) % PANEL, -1)))
    rows = np.where(order < 0, 0, places[order]).astype(np.uint64)
    data = pool.memory.take(library.c.sk_packed_bytes(format, len(rows), width))
    scales = np.zeros(len(rows), np.float32) if format is Format.I8 else None
    kind = Format.BF16 if sources[0].dtype == torch.bfloat16 else Format.F32
    library.c.sk_pack(
        pool.handle,
        format,
        len(rows),
        width,
        rows.ctypes.data,
        kind,
        data.ctypes.data,
        None if scales is None else scales.ctypes.data,
    )
    offsets = None
    if bias:
        flat = torch.cat([part.float() for part in bias]).numpy()
        offsets = np.where(order < 0, 0, flat[order]).astype(np.float32)
    matrix = CMatrix(
        data.ctypes.data,
        None if scales is None else scales.ctypes.data,
        None if offsets is None else offsets.ctypes.data,
        format,
        len(rows),
        library.c.sk_padded_k(format, width),
    )
    return PackedWeight(matrix, format, width, data, scales, offsets)


def _readable(part: Tensor) -> Tensor:
    """Rows of which each is contiguous, in a type that the packer reads."""
    part = part if part.dtype in (torch.bfloat16, torch.float32) else part.float()
    return part if part.stride(1) == 1 else part.contiguous()


def _addresses(source: Tensor) -> np.ndarray:
    step = source.stride(0) * source.element_size()
    return source.data_ptr() + np.arange(len(source), dtype=np.int64) * step


def _gated(size: int) -> np.ndarray:
    """Which row of ``[gate; up]`` each packed column is; -1 where the last 32 are not full."""
    inner = np.arange(-(-size // HALF) * HALF).reshape(-1, HALF)
    inner = np.where(inner < size, inner, -1)
    up = np.where(inner < 0, -1, inner + size)
    return np.stack((inner, up), axis=1).reshape(-1)
