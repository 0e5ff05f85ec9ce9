"""Attention with a shared prefix: every implementation against float64 attention to a row's whole context."""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

CASCADE = backends("servekit.kernels.cascade_attention", "cascade_attention")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(prefix, own, block_size, kv_heads, width, dtype):
    """Rows whose first blocks are the same ones; each has a copy of the tail of the prefix that fills no block."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2, prefix, kv_heads, width, generator=generator)
    whole_blocks = -(-prefix // block_size)
    needed = [-(-(prefix + tokens) // block_size) - prefix // block_size for tokens in own]
    cache = torch.full((2, 1 + whole_blocks + sum(needed), block_size, kv_heads, width), float("nan"))
    order = (torch.randperm(cache.shape[1] - 1, generator=generator) + 1).tolist()
    first = [order.pop() for _ in range(whole_blocks)]
    tables = torch.full((len(own), max(-(-(prefix + tokens) // block_size) for tokens in own)), 2**30)
    contexts = []
    for row, tokens in enumerate(own):
        mine = first[: prefix // block_size] + [order.pop() for _ in range(needed[row])]
        if row == 0 and prefix % block_size:
            mine[prefix // block_size] = first[-1]
        tables[row, : len(mine)] = torch.tensor(mine)
        rest = torch.randn(2, tokens, kv_heads, width, generator=generator)
        contexts.append(torch.cat((shared, rest), dim=1).to(dtype))
        for position in range(prefix + tokens):
            cache[:, mine[position // block_size], position % block_size] = contexts[-1][:, position].float()
    return cache.to(dtype).to(DEVICE), tables.to(torch.int32).to(DEVICE), contexts


def exact(query, keys, values, scale, soft_cap, sinks=None):
    group = query.shape[0] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
    return torch.einsum("ht,thd->hd", scores.softmax(dim=-1)[:, : len(keys)], values)


def check(
    backend, dtype, prefix, own, *, heads=(4, 2), width=16, block_size=16, soft_cap=0.0, window=0, has_sinks=False
):
    cache, tables, contexts = make(prefix, own, block_size, heads[1], width, dtype)
    query = torch.randn(len(own), heads[0], width, generator=torch.Generator().manual_seed(1)).to(dtype)
    lengths = torch.tensor([prefix + tokens for tokens in own], dtype=torch.int32, device=DEVICE)
    scale = width**-0.5
    sinks = torch.linspace(-1, 2, heads[0]) if has_sinks else None
    given = {"window": window, "sinks": None if sinks is None else sinks.to(DEVICE)}
    found = CASCADE[backend](query.to(DEVICE), cache, tables, lengths, prefix, scale, soft_cap, **given)
    seen = [context[:, -window:] for context in contexts]
    wanted = torch.stack([exact(query[row], *seen[row], scale, soft_cap, sinks) for row in range(len(own))])
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), cases(CASCADE))
@pytest.mark.parametrize(
    ("prefix", "own", "heads", "block_size"),
    [
        (64, [1, 5, 70], (4, 2), 16),
        (21, [3, 1], (8, 1), 16),  # the prefix ends within a block
        (0, [4, 9], (4, 4), 8),
        (40, [1] * 9, (6, 2), 16),
        (5, [0, 2], (2, 2), 4),  # a row may have no token of its own
    ],
)
def test_agrees_with_float64(backend, dtype, prefix, own, heads, block_size):
    check(backend, dtype, prefix, own, heads=heads, block_size=block_size)


@pytest.mark.parametrize(("backend", "dtype"), cases(CASCADE))
@pytest.mark.parametrize("width", [16, 24])
def test_with_a_soft_cap(backend, dtype, width):
    check(backend, dtype, 33, [2, 40], width=width, soft_cap=3.0)


@pytest.mark.parametrize(("backend", "dtype"), cases(CASCADE))
@pytest.mark.parametrize("window", [1, 9, 45, 1000], ids="window {}".format)
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
def test_a_window_moves_with_each_row_and_sinks_take_their_share(backend, dtype, window, has_sinks):
    """Windows that end in a row's own tokens, in the prefix, and before it."""
    check(backend, dtype, 40, [1, 8, 60], heads=(6, 2), window=window, has_sinks=has_sinks)


@pytest.mark.parametrize(("backend", "dtype"), [case for case in cases(CASCADE) if "triton" in case.id])
def test_both_phases_split_among_programs(backend, dtype, monkeypatch):
    splitting = importlib.import_module("servekit.kernels.merge_attention.triton_backend")
    monkeypatch.setattr(splitting, "SHORTEST", 16)
    assert splitting.splits_of(1, 128) > 1
    check(backend, dtype, 150, [1, 90], block_size=16)
    check(backend, dtype, 150, [1, 90], block_size=16, window=60)
