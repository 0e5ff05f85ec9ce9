"""More than 2**31 numbers: places are counted in 64 bits. On a CPU only the pages that are touched take memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.backends import DEVICE

from common_platform.kernels import runs_triton
from servekit.kernels.fused_moe.experts import ChannelExperts
from servekit.kernels.paged_attention.metadata import paged_metadata

BLOCK, KV_HEADS, HEADS, WIDTH = 16, 8, 16, 128
MANY = 2**31 // (BLOCK * KV_HEADS * WIDTH) + 3  # blocks


def has_room() -> bool:
    return DEVICE.type == "cpu" or torch.cuda.mem_get_info(DEVICE)[0] > 12 << 30


pytestmark = [
    pytest.mark.skipif(runs_triton(DEVICE) is not None, reason="triton does not run here"),
    pytest.mark.skipif(runs_triton(DEVICE) is None and not has_room(), reason="the device has no 12 GiB free"),
]


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    if DEVICE.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    return torch.from_numpy(np.zeros(shape, {torch.int8: np.int8, torch.float32: np.float32}[dtype]))


def attended(num_blocks: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row reads that wrote its keys and values, in 8 bits, into ``block``; and the numbers there."""
    from servekit.kernels.paged_attention.triton_backend import paged_attention
    from servekit.kernels.rope_kv_write.triton_backend import rope_kv_write

    generator = torch.Generator().manual_seed(0)
    cache = zeros(2, num_blocks, BLOCK, KV_HEADS, WIDTH, dtype=torch.int8)
    scales = zeros(2, num_blocks, BLOCK, KV_HEADS, dtype=torch.float32)
    qk = torch.randn(5, HEADS + KV_HEADS, WIDTH, generator=generator).to(DEVICE)
    value = torch.randn(5, KV_HEADS, WIDTH, generator=generator).to(DEVICE)
    cos, sin = torch.randn(2, 5, 1, WIDTH, generator=generator).to(DEVICE)
    tables = np.asarray([[block]], np.int32)
    metadata = paged_metadata(tables, np.asarray([0]), np.asarray([5]), BLOCK, 0, DEVICE)
    query = rope_kv_write(qk, value, cos, sin, cache, metadata.write_places, kv_scales=scales)
    out = paged_attention(query, cache, metadata, WIDTH**-0.5, kv_scales=scales)
    return out, cache[:, block].clone()


def test_keys_and_values_behind_two_to_the_31_are_written_and_read_by_triton():
    expected, few = attended(3, 2)
    found, many = attended(MANY, MANY - 1)
    assert torch.equal(many, few)
    assert few.any()
    assert torch.equal(found, expected)


def test_the_weights_of_experts_behind_two_to_the_31_are_read_by_triton():
    from servekit.kernels.fused_moe.triton_backend import fused_moe

    hidden, inner = 2112, 1024
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, hidden, generator=generator).to(DEVICE)
    weights = torch.ones(2, 1, device=DEVICE)
    mine = [
        torch.randint(-9, 9, shape, dtype=torch.int8, generator=generator).to(DEVICE)
        for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    found = []
    for num_experts in (1, 2**31 // (2 * inner * hidden) + 2):
        layers = []
        for one in mine:
            values = zeros(num_experts, *one.shape, dtype=torch.int8)
            values[-1] = one
            layers.append(ChannelExperts(values, torch.full((num_experts, one.shape[0]), 0.01, device=DEVICE)))
        experts = torch.full((2, 1), num_experts - 1, dtype=torch.int32, device=DEVICE)
        found.append(fused_moe(x, experts, weights, *layers))
    assert found[0].any()
    assert torch.equal(*found)
