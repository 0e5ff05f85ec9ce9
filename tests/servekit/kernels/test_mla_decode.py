"""Latent attention: every implementation against float64 attention with uncompressed heads."""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases, multiplies_float8

from servekit.kernels.mla_decode import absorb, compress, project

MLA = backends("servekit.kernels.mla_decode", "mla_decode")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SIZES = [  # heads, nope, rope, latent, value
    (3, 24, 16, 32, 24),
    (20, 16, 8, 48, 16),
]


def make(contexts, block_size, width, dtype):
    """Cache with stale numbers in it, tables of shuffled blocks, and the tokens of each row."""
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-context // block_size) for context in contexts]
    cache = torch.full((1 + sum(blocks), block_size, width), float("nan"))
    order = (torch.randperm(sum(blocks), generator=generator) + 1).tolist()
    tables = torch.full((len(contexts), max(max(blocks), 1)), 2**30, dtype=torch.int32)  # not to be read
    tokens = []
    for row, context in enumerate(contexts):
        mine = [order.pop() for _ in range(blocks[row])]
        tables[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        tokens.append(torch.randn(context, width, generator=generator).to(dtype))
        for position in range(context):
            cache[mine[position // block_size], position % block_size] = tokens[-1][position].float()
    return cache.to(dtype).to(DEVICE), tables.to(DEVICE), torch.tensor(contexts, dtype=torch.int32).to(DEVICE), tokens


def exact(query, query_rope, tokens, key_up, value_up, latent, scale):
    """``[heads, value]`` and ``[heads]``: keys and values of every head made from the latents, in float64."""
    compressed, rope = tokens.double().split([latent, tokens.shape[1] - latent], dim=-1)
    keys = torch.einsum("tl,hnl->htn", compressed, key_up)
    values = torch.einsum("tl,hvl->htv", compressed, value_up)
    scores = (torch.einsum("hn,htn->ht", query, keys) + query_rope @ rope.t()) * scale
    return torch.einsum("ht,htv->hv", scores.softmax(dim=-1), values), scores.logsumexp(dim=-1)


def check(backend, dtype, sizes, contexts, block_size):
    heads, nope, rope, latent, value = sizes
    generator = torch.Generator().manual_seed(1)
    key_up = torch.randn(heads, nope, latent, dtype=torch.float64, generator=generator) * latent**-0.5
    value_up = torch.randn(heads, value, latent, dtype=torch.float64, generator=generator) * latent**-0.5
    query = torch.randn(len(contexts), heads, nope, dtype=torch.float64, generator=generator)
    query_rope = torch.randn(len(contexts), heads, rope, generator=generator).to(dtype)
    cache, tables, lengths, tokens = make(contexts, block_size, latent + rope, dtype)
    moved = absorb(query, key_up).to(dtype)
    whole = torch.cat((moved, query_rope), dim=-1).to(DEVICE)
    scale = (nope + rope) ** -0.5
    out, log_sums = MLA[backend](whole, cache, tables, lengths, latent, scale)
    assert out.dtype == dtype
    assert log_sums.dtype == torch.float32
    found = project(out.double().cpu(), value_up)
    for row, context in enumerate(contexts):
        if not context:
            assert not bool(out[row].any())
            assert bool((log_sums[row] == float("-inf")).all())
            continue
        wanted, log_sum = exact(query[row], query_rope[row].double(), tokens[row], key_up, value_up, latent, scale)
        torch.testing.assert_close(found[row], wanted, rtol=TOLERANCE[dtype] * 2, atol=TOLERANCE[dtype] * 2)
        tolerance = TOLERANCE[dtype] * 2
        torch.testing.assert_close(log_sums[row].double().cpu(), log_sum, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("backend", "dtype"), cases(MLA))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("contexts", "block_size"), [([1], 4), ([33, 0, 70], 16), ([5, 32, 64], 7)])
def test_absorbed_attention_is_attention_with_uncompressed_heads(backend, dtype, sizes, contexts, block_size):
    check(backend, dtype, sizes, contexts, block_size)


@pytest.mark.parametrize(("backend", "dtype"), cases(MLA))
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_a_cache_of_eight_bits_is_read_as_what_its_scales_make_of_it(backend, dtype, stored):
    """Exactly: the reference is given the numbers that are left."""
    if backend == "triton" and stored != torch.int8 and not multiplies_float8():
        pytest.skip("this device does not have float8")
    latent, width, contexts = 48, 56, [33, 0, 70]
    cache, tables, lengths, tokens = make(contexts, 16, width, torch.float32)
    widths = torch.tensor([latent, width - latent])
    scales = torch.full((*cache.shape[:2], 2), float("nan"))
    eight = torch.full(cache.shape, 0.0).to(stored)
    left = torch.full(cache.shape, float("nan"))
    for row, context in enumerate(contexts):
        values, each = compress(tokens[row], latent, stored)
        for position in range(context):
            at = tables[row, position // 16].item(), position % 16
            eight[at], scales[at] = values[position], each[position]
            left[at] = values[position].float() * each[position].repeat_interleave(widths)
    query = torch.randn(len(contexts), 3, width, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    given = (tables, lengths, latent, width**-0.5)
    out, log_sums = MLA[backend](query, eight.to(DEVICE), *given, kv_scales=scales.to(DEVICE))
    wanted, wanted_sums = MLA["reference"](query.float(), left.to(DEVICE), *given)
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype] * 2
    torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_sums, wanted_sums, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("backend", "dtype"), [case for case in cases(MLA) if "triton" in case.id])
def test_contexts_split_among_programs(backend, dtype, monkeypatch):
    splitting = importlib.import_module("servekit.kernels.merge_attention.triton_backend")
    monkeypatch.setattr(splitting, "SHORTEST", 16)
    assert splitting.splits_of(1, 128) > 1
    check(backend, dtype, SIZES[0], [130, 1, 17], 16)
