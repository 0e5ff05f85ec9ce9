"""Paged attention: every implementation against plain attention over contiguous keys, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.kernels.paged_attention import deterministic, reference, sdpa
from servekit.kernels.paged_attention.metadata import build_metadata

IMPLEMENTATIONS = {
    "reference": reference.paged_attention,
    "sdpa": sdpa.paged_attention,
    "deterministic": deterministic.paged_attention,
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")


def exact(query, keys, values, start, scale, window, soft_cap):
    """One row: ``query`` [n, heads, d] at positions from ``start`` on; ``keys`` [context, kv_heads, d]; float64."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(groups, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    positions, columns = torch.arange(start, start + len(query))[:, None], torch.arange(len(keys))
    seen = columns <= positions
    if window:
        seen &= columns > positions - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 37), st.integers(1, 19)), min_size=1, max_size=5),
    block_size=st.sampled_from([8, 16]),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    window=st.sampled_from([0, 0, 1, 7]),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(name, dtype, rows, block_size, heads, window, soft_cap, seed):
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    width = 16
    num_blocks = 1 + sum(-(-(start + count) // block_size) for start, count in rows)
    cache = torch.full((2, num_blocks, block_size, kv_heads, width), float("nan"), dtype=dtype)  # stale memory
    cache[:, 0] = 0
    order = torch.randperm(num_blocks - 1, generator=generator).add(1).tolist()
    tables = np.zeros((len(rows), 10), np.int32)
    queries, expected = [], []
    for row, (start, count) in enumerate(rows):
        context = start + count
        blocks = [order.pop() for _ in range(-(-context // block_size))]
        tables[row, : len(blocks)] = blocks
        keys, values = torch.randn(2, context, kv_heads, width, generator=generator).to(dtype)
        query = torch.randn(count, num_heads, width, generator=generator).to(dtype)
        places = torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in range(context)])
        cache.view(2, -1, kv_heads, width)[:, places] = torch.stack((keys, values))
        queries.append(query)
        expected.append(exact(query, keys, values, start, width**-0.5, window, soft_cap))
    starts, counts = np.array([s for s, _ in rows]), np.array([c for _, c in rows])
    metadata = build_metadata(tables, starts, counts, block_size, window, CPU)
    actual = IMPLEMENTATIONS[name](torch.cat(queries), cache, metadata, width**-0.5, soft_cap)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), torch.cat(expected), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
