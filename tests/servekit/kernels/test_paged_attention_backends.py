"""Paged attention on small awkward batches: every implementation against plain attention in float64."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

from servekit.kernels.kv_write.reference import kv_write
from servekit.kernels.paged_attention.metadata import build_metadata, paged_metadata

ATTENTION = backends("servekit.kernels.paged_attention", "paged_attention")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BATCHES = {  # (tokens before, new tokens) of each row
    "decode": [(0, 1), (16, 1), (37, 1)],
    "long decode": [(600, 1)],
    "prefill": [(0, 33)],
    "mixed": [(20, 1), (5, 17), (0, 40), (63, 1)],
    "chunk after a prefix": [(49, 7)],
}


class Batch:
    """Rows of random keys and values in blocks that are in no order; stale memory is not a number."""

    def __init__(self, rows, *, heads=4, kv_heads=2, width=16, block_size=16, dtype=torch.float32, window=0):
        generator = torch.Generator().manual_seed(len(rows) + heads + width)
        num_blocks = 1 + sum(-(-(start + count) // block_size) for start, count in rows)
        self.cache = torch.full((2, num_blocks, block_size, kv_heads, width), float("nan"), dtype=dtype)
        order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        longest = max(-(-(start + count) // block_size) for start, count in rows)
        tables = np.zeros((len(rows), longest + 1), np.int32)
        queries, self.keys, self.values, self.rows = [], [], [], rows
        for row, (start, count) in enumerate(rows):
            context = start + count
            blocks = [order.pop() for _ in range(-(-context // block_size))]
            tables[row, : len(blocks)] = blocks
            keys, values = torch.randn(2, context, kv_heads, width, generator=generator).to(dtype)
            places = torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in range(context)])
            kv_write(self.cache, keys, values, places)
            queries.append(torch.randn(count, heads, width, generator=generator).to(dtype))
            self.keys.append(keys)
            self.values.append(values)
        self.query = torch.cat(queries).to(DEVICE)
        self.cache = self.cache.to(DEVICE)
        self.window = window
        starts, counts = np.array([s for s, _ in rows]), np.array([c for _, c in rows])
        self.given = (tables, starts, counts, block_size, window, DEVICE)

    def expected(self, scale, soft_cap=0.0, sinks=None):
        outs, first = [], 0
        for (start, count), keys, values in zip(self.rows, self.keys, self.values, strict=True):
            query = self.query[first : first + count].double().cpu()
            first += count
            groups = query.shape[1] // keys.shape[1]
            keys, values = (t.double().repeat_interleave(groups, dim=1) for t in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            at, columns = torch.arange(start, start + count)[:, None], torch.arange(len(keys))
            seen = columns <= at
            if self.window:
                seen &= columns > at - self.window
            scores = scores.masked_fill(~seen, float("-inf"))
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, count, 1)), dim=-1)
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(keys)], values))
        return torch.cat(outs)


@pytest.mark.parametrize(("backend", "dtype"), cases(ATTENTION))
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("build", [build_metadata, paged_metadata])
def test_agrees_with_float64(backend, dtype, rows, build):
    if backend != "triton" and build is paged_metadata:
        pytest.skip("for kernels that read block tables")
    batch = Batch(rows, dtype=dtype)
    actual = ATTENTION[backend](batch.query, batch.cache, build(*batch.given), 0.25)
    assert actual.dtype == dtype
    exact = batch.expected(0.25)
    torch.testing.assert_close(actual.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


FORMS = {
    "one head": {"heads": 1, "kv_heads": 1},
    "groups of three": {"heads": 6, "kv_heads": 2, "block_size": 8},
    "groups of 17": {"heads": 17, "kv_heads": 1},
    "odd head_dim": {"width": 24},
    "wide heads": {"width": 80, "heads": 2, "kv_heads": 1},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "large blocks": {"block_size": 64},
}


@pytest.mark.parametrize(("backend", "dtype"), cases(ATTENTION))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_heads_windows_and_blocks_of_any_form(backend, dtype, form, kind):
    batch = Batch(BATCHES[kind], dtype=dtype, **form)
    actual = ATTENTION[backend](batch.query, batch.cache, build_metadata(*batch.given), 0.3)
    exact = batch.expected(0.3)
    torch.testing.assert_close(actual.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), cases(ATTENTION))
@pytest.mark.parametrize("rows", [BATCHES["long decode"], BATCHES["mixed"]], ids=["splits", "mixed"])
@pytest.mark.parametrize("window", [0, 30])
def test_soft_cap_and_sinks(backend, dtype, rows, window):
    batch = Batch(rows, dtype=dtype, window=window)
    sinks = torch.tensor([0.5, -1.0, 3.0, 40.0])
    actual = ATTENTION[backend](
        batch.query, batch.cache, build_metadata(*batch.given), 0.25, 5.0, sinks=sinks.to(DEVICE)
    )
    exact = batch.expected(0.25, 5.0, sinks)
    torch.testing.assert_close(actual.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), cases(ATTENTION))
@pytest.mark.parametrize("rows", [BATCHES["long decode"], BATCHES["mixed"]], ids=["splits", "mixed"])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_keys_and_values_of_eight_bits(backend, dtype, rows, stored):
    """The cache's own numbers are the truth: what is held against is attention over them in float64."""
    batch = Batch(rows, dtype=dtype)
    limit = 127.0 if stored == torch.int8 else 448.0
    whole = torch.nan_to_num(batch.cache.float())
    scales = whole.abs().amax(dim=-1).clamp(min=1e-6) / limit
    cache = (whole / scales[..., None]).round().to(stored)
    batch_exact = Batch(rows, dtype=torch.float32)
    batch_exact.query = batch.query
    tables, block_size = batch.given[0], batch.given[3]
    for row, (start, count) in enumerate(rows):
        for half, target in ((0, batch_exact.keys), (1, batch_exact.values)):
            places = [tables[row, p // block_size] * block_size + p % block_size for p in range(start + count)]
            real = cache[half].float() * scales[half][..., None]
            target[row] = real.reshape(-1, *real.shape[2:])[places].cpu()
    exact = batch_exact.expected(0.25)
    actual = ATTENTION[backend](batch.query, cache, build_metadata(*batch.given), 0.25, kv_scales=scales.contiguous())
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_splits", [1, 4])
def test_triton_gives_a_row_the_same_answer_in_any_number_of_splits(num_splits, monkeypatch):
    if "triton" not in ATTENTION:
        pytest.skip("triton does not run here")
    module = importlib.import_module("servekit.kernels.paged_attention.triton_backend")
    monkeypatch.setattr(module, "num_splits", lambda *_: num_splits)
    batch = Batch([(300, 1), (0, 1)])
    actual = ATTENTION["triton"](batch.query, batch.cache, build_metadata(*batch.given), 0.25)
    torch.testing.assert_close(actual.double().cpu(), batch.expected(0.25), rtol=2e-5, atol=2e-5)


def test_rows_that_fill_a_graph_up_are_passed_over():
    if "triton" not in ATTENTION:
        pytest.skip("triton does not run here")
    batch = Batch([(20, 1), (3, 1)])
    metadata = paged_metadata(*batch.given)
    assert metadata.paged is not None
    metadata.paged.contexts[1] = 0
    actual = ATTENTION["triton"](batch.query, batch.cache, metadata, 0.25)
    torch.testing.assert_close(actual[:1].double().cpu(), batch.expected(0.25)[:1], rtol=2e-5, atol=2e-5)
