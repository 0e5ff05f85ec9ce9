"""Eight-bit activations in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

# What the largest magnitude of a group becomes. The fnuz form is what MI300 multiplies: one bit of range less.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
SMALLEST = 1e-10  # a group of zeros still has a scale


def quantize(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of rows, each group of columns by its largest magnitude.

    Args:
        x: ``[tokens, width]``, float32, bfloat16 or float16; the arithmetic is float32.
        dtype: int8, float8_e4m3fn or float8_e4m3fnuz.
        group: columns that share a scale; ``width`` for one scale a token. The last group may be short.

    Returns:
        ``[tokens, width]`` in ``dtype``, and ``[tokens, ceil(width / group)]`` float32, so that values times scales
        are about ``x``. int8 is rounded to the nearest, ties upward; float8 to the nearest, ties to even.

    Source: Dettmers et al., "LLM.int8()", NeurIPS 2022 (per token); DeepSeek-V3 report, 2024, 3.3.2 (groups of 128).
    """
    tokens, width = x.shape
    num_groups = -(-width // group)
    padded = torch.nn.functional.pad(x.float(), (0, num_groups * group - width)).view(tokens, num_groups, group)
    largest = LARGEST[dtype]
    scales = padded.abs().amax(dim=-1).clamp_min(SMALLEST) / largest
    scaled = padded / scales[..., None]
    if dtype == torch.int8:
        scaled = torch.floor(scaled + 0.5)
    values = scaled.clamp(-largest, largest).view(tokens, num_groups * group)[:, :width].to(dtype)
    return values.contiguous(), scales
