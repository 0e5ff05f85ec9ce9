"""Products with weights of few bits, by Triton.

Few tokens (16 or less) are bound by reading the weight once: the input columns are split among programs, whose float32
sums are added by a second kernel in one order. With more tokens one program has all columns of its tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
from servekit.kernels.quantized_linear.tiles import SMALL, Tiles, tiles_for
from servekit.kernels.quantized_linear.triton_tiles import SUMS, TOGETHER, add_splits
from servekit.kernels.quantized_linear.triton_w4 import int4_tiles, w4a16_linear, w4a16_tiles
from servekit.kernels.quantized_linear.triton_w8 import (
    fp8_block_linear,
    fp8_block_product,
    fp8_block_tiles,
    w8_tiles,
    w8a8_linear,
    w8a8_name,
    w8a8_product,
    w8a16_linear,
)
from servekit.kernels.quantized_linear.weights import BLOCK, HALF, MIDDLE, SPAN

__all__ = [
    "fp8_block_linear",
    "fp8_block_product",
    "int4_tiles",
    "w4a16_linear",
    "w8a8_linear",
    "w8a8_name",
    "w8a8_product",
    "w8a16_linear",
]


def _specialization(
    kernel: Any, name: str, pointers: dict[str, str], constants: dict[str, Any], cut: Tiles, targets: tuple[str, ...]
) -> Specialization:
    sizes = {"tokens": "i32", "out": "i32:16", "width": "i32:16"}
    tile = {"ROWS": cut.rows, "COLS": cut.cols, "SPLITS": cut.splits, "TOGETHER": TOGETHER, "bias_ptr": None}
    many = f"{cut.rows} x {cut.cols}" + (f", {cut.splits} splits" if cut.splits > 1 else "")
    return Specialization(
        kernel=kernel,
        name=f"{name}, tiles of {many}",
        signature=pointers | {"scales_ptr": "*fp32", "out_ptr": "*fp32" if cut.splits > 1 else "*bf16"} | sizes,
        constants=tile | constants,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        targets=targets,
    )


def _specializations(tokens: int) -> list[Specialization]:
    """Of a product with a weight of 4096 x 4096."""
    wide, narrow = tiles_for(tokens, 4096, 4096, SPAN), tiles_for(tokens, 4096, 4096, 64)
    unpacked = tiles_for(tokens, 4096, 4096, SPAN, unpacks=True)
    everywhere = tuple(TARGETS)
    found = []
    for kind, sums, targets in (("i8", tl.int32, everywhere), ("fp8e4nv", tl.float32, NVIDIA_FP8)):
        pointers = {"x_ptr": f"*{kind}", "x_scales_ptr": "*fp32", "weight_ptr": f"*{kind}"}
        constants = {"INNER": wide.inner, "SUM": sums, "PROMOTE": wide.inner if kind != "i8" else None}
        found.append(_specialization(w8_tiles, f"w8a8, {kind}", pointers, constants, wide, targets))
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*i8"}
    constants = {"INNER": narrow.inner, "SUM": tl.float32, "PROMOTE": None, "x_scales_ptr": None}
    found.append(_specialization(w8_tiles, "w8a16, bf16", pointers, constants, narrow, everywhere))
    pointers = {"x_ptr": "*fp8e4nv", "x_scales_ptr": "*fp32", "weight_ptr": "*fp8e4nv"}
    found.append(_specialization(fp8_block_tiles, "fp8 blocks", pointers, {"BLOCK": BLOCK}, wide, NVIDIA_FP8))
    int4 = {"x_ptr": "*bf16", "packed_ptr": "*u8", "group": "i32:16"}
    constants = {"HALF": HALF, "MIDDLE": MIDDLE, "FEW_GROUPS": True}
    zeros = {"zeros_ptr": None}
    found.append(_specialization(w4a16_tiles, "w4a16, bf16", int4, constants | zeros, unpacked, everywhere))
    return found


SPECIALIZATIONS = (
    *_specializations(1),
    *_specializations(4096),
    _specialization(
        w4a16_tiles,
        "w4a16 with zeros, groups of 32",
        {"x_ptr": "*bf16", "packed_ptr": "*u8", "zeros_ptr": "*u8", "group": "i32:16"},
        {"HALF": HALF, "MIDDLE": MIDDLE, "FEW_GROUPS": False},
        replace(tiles_for(1, 4096, 4096, SPAN), cols=32, num_stages=2),
        tuple(TARGETS),
    ),
    Specialization(
        kernel=add_splits,
        name="bf16, 4 splits",
        signature={"parts_ptr": "*fp32", "out_ptr": "*bf16", "elements": "i32", "out": "i32:16"},
        constants={"bias_ptr": None, "SPLITS": 4, "SUMS": SUMS},
    ),
)


def _work(operation: str, tokens: int, weight_bytes: float, x_bytes: int) -> Work:
    """Of a weight of 14336 x 4096, as a gate of an 8B model is."""
    out, width = 14336, 4096
    return Work(
        operation=f"quantized_linear ({operation})",
        shape=f"{tokens} tokens, {out} x {width}",
        bytes=int(out * width * weight_bytes) + tokens * (width * x_bytes + out * 2),
        flops=2 * tokens * out * width,
        bound="bandwidth" if tokens <= SMALL else "tensor cores",
        target=0.75 if tokens <= SMALL else 0.6,
    )


WORKS = tuple(
    _work(operation, tokens, weight_bytes, x_bytes)
    for tokens in (1, 16, 4096)
    for operation, weight_bytes, x_bytes in (
        ("w8a8_linear", 1.0, 1),
        ("fp8_block_linear", 1.0, 1),
        ("w4a16_linear", 0.5 + 2 / 128, 2),
    )
)
