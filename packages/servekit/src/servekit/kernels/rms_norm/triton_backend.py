"""RMSNorm in one pass over a row, with the residual added first and 8-bit output where they are asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, Specialization, Work
from servekit.kernels.quantize.reference import LARGEST, SMALLEST
from servekit.kernels.quantize.triton_backend import round_to_eight_bits


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    scale_ptr,  # None: the output is not rounded to eight bits
    x_stride,
    hidden,
    eps,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * hidden + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * hidden + columns, x, mask=inside)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = (x32 * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    if scale_ptr is not None:
        normed = normed.to(x.dtype).to(tl.float32)
        step = tl.maximum(tl.max(tl.abs(normed), axis=0), SMALLEST) / LARGEST
        tl.store(scale_ptr + row, step)
        normed = round_to_eight_bits(normed, step, LARGEST, out_ptr.dtype.element_ty == tl.int8)
    tl.store(out_ptr + row * hidden + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``reference.rms_norm``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.add_rms_norm``; ``residual`` is overwritten with the sum."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, out, residual, None)
    return out, residual


def rms_norm_quantized(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.rms_norm_quantized``; ``residual`` is overwritten with the sum."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, residual, weight, eps, out, residual, scales)
    return out, scales, x if residual is None else residual


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor | None,
    scales: Tensor | None,
) -> None:
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    if rows == 0:
        return
    flat = x if x.is_contiguous() else x.reshape(rows, hidden)
    stride = hidden if x.is_contiguous() else flat.stride(0)
    largest = 0.0 if scales is None else LARGEST[out.dtype]
    block = triton.next_power_of_2(hidden)
    given = (flat, residual, weight, out, total, scales, stride, hidden, eps, largest, SMALLEST, block)
    _rms_norm[(rows,)](*given, num_warps=_warps(block))


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _specialization(
    name: str, dtype: str, out: str, hidden: int, *, residual: bool, limit: float = 0.0
) -> Specialization:
    pointer = f"*{dtype}"
    given = {"x_ptr": pointer, "weight_ptr": pointer, "out_ptr": f"*{out}"}
    given |= {"x_stride": "i32:16", "hidden": "i32:16", "eps": "fp32"}
    block = triton.next_power_of_2(hidden)
    constants: dict[str, object] = {"LARGEST": limit, "SMALLEST": SMALLEST, "BLOCK": block}
    constants |= dict.fromkeys(("residual_ptr", "total_ptr", "scale_ptr"))
    for key, kind, used in (
        ("residual_ptr", pointer, residual),
        ("total_ptr", pointer, residual),
        ("scale_ptr", "*fp32", limit > 0),
    ):
        if used:
            given[key] = kind
            del constants[key]
    targets = NVIDIA_FP8 if out.startswith("fp8") else tuple(Specialization.__dataclass_fields__["targets"].default)
    return Specialization(
        kernel=_rms_norm, name=name, signature=given, constants=constants, num_warps=_warps(block), targets=targets
    )


SPECIALIZATIONS = (
    _specialization("bf16, hidden 4096", "bf16", "bf16", 4096, residual=False),
    _specialization("bf16, hidden 4096, residual", "bf16", "bf16", 4096, residual=True),
    _specialization("fp32, hidden 8192, residual", "fp32", "fp32", 8192, residual=True),
    _specialization("bf16, hidden 4096, residual, to int8", "bf16", "i8", 4096, residual=True, limit=127.0),
    _specialization("bf16, hidden 4096, residual, to fp8", "bf16", "fp8e4nv", 4096, residual=True, limit=448.0),
)

WORKS = (
    Work(
        operation="rms_norm (add_rms_norm)",
        shape="8192 tokens, hidden 4096, bf16",
        bytes=4 * 8192 * 4096 * 2,
        flops=6 * 8192 * 4096,
        bound="bandwidth",
        target=0.85,
    ),
)
