"""FlashInfer behind our attention: what it is asked, by a module in its place that checks it as the real one would.

It has not run on a device here. The stand-in takes the documented calls alone, and computes from them in float64.
"""

from __future__ import annotations

import json
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from common_platform.errors import ConfigError
from servekit.kernels import choice, tuning
from servekit.kernels.paged_attention.flashinfer_adapter import FlashInferAttention, pages_of
from servekit.kernels.paged_attention.metadata import StepRows, build_metadata, paged_metadata
from servekit.kernels.paged_attention.sdpa import paged_attention
from servekit.layers.kernels import kernels_of

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH, BLOCK = 8, 2, 64, 16


def is_int32(tensor, size):
    return tensor.dtype == torch.int32 and tensor.is_contiguous() and tuple(tensor.shape) == (size,)


class Wrapper:
    """What both kinds have in common."""

    made: ClassVar[list[Wrapper]] = []

    def __init__(self, workspace, kv_layout, **settings):
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.settings, self.plans, self.runs = settings, 0, 0
        Wrapper.made.append(self)

    def _planned(self, firsts, blocks, lasts, heads, kv_heads, head_dim, page_size, counts, given):
        rows = len(lasts)
        assert is_int32(firsts, rows + 1)
        assert is_int32(blocks, int(firsts[-1]))
        assert is_int32(lasts, rows)
        assert bool(((lasts >= 1) & (lasts <= page_size)).all())
        assert heads % kv_heads == 0
        assert given["q_data_type"] == given["kv_data_type"] == torch.float16
        self.plans += 1
        self.given = (firsts, blocks, lasts, heads, kv_heads, head_dim, page_size, counts, given)

    def run(self, q, paged_kv_cache, *, out):
        firsts, blocks, lasts, heads, kv_heads, head_dim, page_size, counts, given = self.given
        assert self.plans
        assert isinstance(paged_kv_cache, tuple)
        assert q.is_contiguous()
        assert tuple(q.shape) == (int(counts[-1]), heads, head_dim) == tuple(out.shape)
        for part in paged_kv_cache:
            assert tuple(part.shape[1:]) == (page_size, kv_heads, head_dim)
        self.runs += 1
        for row in range(len(lasts)):
            mine = blocks[firsts[row] : firsts[row + 1]].long()
            context = (len(mine) - 1) * page_size + int(lasts[row])
            keys, values = (part[mine].flatten(0, 1)[:context].double() for part in paged_kv_cache)
            keys, values = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (keys, values))
            first, last = int(counts[row]), int(counts[row + 1])
            scores = torch.einsum("qhd,khd->hqk", q[first:last].double(), keys) * given["sm_scale"]
            if given["logits_soft_cap"]:
                scores = given["logits_soft_cap"] * torch.tanh(scores / given["logits_soft_cap"])
            position = torch.arange(context - (last - first), context)[:, None]
            seen = torch.arange(context)[None] <= position
            if given["window_left"] >= 0:
                seen &= torch.arange(context)[None] >= position - given["window_left"]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
        return out


class Decode(Wrapper):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None, sm_scale=None,
    ):  # fmt: skip
        given = {"window_left": window_left, "logits_soft_cap": logits_soft_cap, "sm_scale": sm_scale}
        given |= {"q_data_type": q_data_type, "kv_data_type": kv_data_type}
        counts = torch.arange(len(last_page_len) + 1)
        self._planned(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, counts, given)


class Prefill(Wrapper):
    def plan(
        self, *, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, causal=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert causal
        assert is_int32(qo_indptr, len(paged_kv_last_page_len) + 1)
        given = {"window_left": window_left, "logits_soft_cap": logits_soft_cap, "sm_scale": sm_scale}
        given |= {"q_data_type": q_data_type, "kv_data_type": kv_data_type}
        pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._planned(*pages, num_qo_heads, num_kv_heads, head_dim_qk, page_size, qo_indptr, given)


@pytest.fixture
def flashinfer(monkeypatch):
    module = types.ModuleType("flashinfer")
    module.__spec__ = types.SimpleNamespace(name="flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(Wrapper, "made", [])
    monkeypatch.setattr("servekit.kernels.paged_attention.flashinfer_adapter.WORKSPACE_BYTES", 1 << 10)
    return module


def otherwise(query, *given, **named):
    raise AssertionError("FlashInfer does this")


def make(rows, window=0, dtype=torch.float16):
    """Some rows of (tokens before, new tokens): what our kernels are given."""
    generator = torch.Generator().manual_seed(0)
    starts, counts = np.array([s for s, _ in rows]), np.array([c for _, c in rows])
    blocks = -(-(starts + counts) // BLOCK)
    cache = torch.randn(2, 1 + blocks.sum(), BLOCK, KV_HEADS, WIDTH, generator=generator).to(dtype)
    order = iter((torch.randperm(int(blocks.sum()), generator=generator) + 1).tolist())
    tables = np.zeros((len(rows), blocks.max() + 2), np.int32)  # wider than the longest context
    for row, count in enumerate(blocks):
        tables[row, :count] = [next(order) for _ in range(count)]
    query = torch.randn(int(counts.sum()), HEADS, WIDTH, generator=generator).to(dtype)
    return query, cache, (tables, starts, counts, BLOCK, window, CPU)


@pytest.mark.parametrize(
    "rows", [[(0, 1), (15, 1), (16, 1), (70, 1)], [(0, 33), (20, 1), (5, 17), (31, 2)]], ids=["decode", "mixed"]
)
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_its_answer_is_attention(flashinfer, rows, window, soft_cap):
    query, cache, given = make(rows, window)
    attend = FlashInferAttention(otherwise)
    found = attend(query, cache, paged_metadata(*given), WIDTH**-0.5, soft_cap)
    wanted = paged_attention(query, cache, build_metadata(*given), WIDTH**-0.5, soft_cap)
    torch.testing.assert_close(found, wanted, rtol=4e-3, atol=4e-3)


def test_a_step_is_planned_once_for_all_its_layers(flashinfer):
    attend = FlashInferAttention(otherwise)
    for _ in range(2):  # steps
        query, cache, given = make([(20, 1), (5, 17)])
        metadata = paged_metadata(*given)
        for _ in range(3):  # layers
            attend(query, cache, metadata, WIDTH**-0.5)
    assert [(one.plans, one.runs) for one in Wrapper.made] == [(2, 6)]


def test_tokens_that_fill_up_a_recorded_step_are_left_out(flashinfer):
    query, cache, given = make([(20, 1), (5, 17)])
    padded = torch.cat((query, torch.full_like(query[:6], float("nan"))))
    found = FlashInferAttention(otherwise)(padded, cache, paged_metadata(*given), WIDTH**-0.5)
    assert found.shape == padded.shape
    assert torch.equal(
        found[: len(query)], FlashInferAttention(otherwise)(query, cache, paged_metadata(*given), WIDTH**-0.5)
    )


def test_what_it_does_not_do_goes_to_our_own_kernel(flashinfer):
    asked = []

    def own(query, *given, **named):
        asked.append(named)
        return query

    query, cache, given = make([(20, 1)])
    metadata = paged_metadata(*given)
    attend = FlashInferAttention(own, ["prefill"])
    attend(query, cache, metadata, 0.1)  # a decode step, of which it was not measured to be the faster
    attend = FlashInferAttention(own)
    attend(query, cache, metadata, 0.1, sinks=torch.zeros(HEADS))
    attend(query, cache, metadata, 0.1, kv_scales=torch.ones(2, 3, BLOCK, KV_HEADS))
    attend(query.float(), cache.float(), metadata, 0.1)
    metadata.rows = None
    attend(query, cache, metadata, 0.1)
    assert len(asked) == 5
    assert not Wrapper.made


def test_block_tables_in_its_form():
    rows = StepRows(np.array([[7, 3, 0], [5, 9, 2]]), np.array([3, 32]), np.array([13, 1]), 0)
    firsts, blocks, lasts = pages_of(rows, BLOCK)
    assert (firsts.tolist(), blocks.tolist(), lasts.tolist()) == ([0, 1, 4], [7, 5, 9, 2], [16, 1])


def test_the_choice_is_what_was_measured_and_is_installed(flashinfer, tmp_path, monkeypatch):
    def measured(**libraries):
        tuning.write(tmp_path, tuning.device_name(), {}, libraries)
        tuning.measured_on.cache_clear()

    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    try:
        measured(paged_attention_prefill="flashinfer")
        assert choice.libraries_of("paged_attention", "cuda") == {"prefill": "flashinfer"}
        assert choice.libraries_of("paged_attention", "rocm") == {}
        assert isinstance(kernels_of("cuda").paged_attention, FlashInferAttention)
        measured(paged_attention_prefill=None)
        assert choice.libraries_of("paged_attention", "cuda") == {}
        assert not isinstance(kernels_of("cuda").paged_attention, FlashInferAttention)
        measured(paged_attention_decode="flashinfer")
        monkeypatch.delitem(sys.modules, "flashinfer")
        assert choice.libraries_of("paged_attention", "cuda") == {}
        with pytest.raises(ConfigError, match=r"servekit\[flashinfer\]"):
            FlashInferAttention(otherwise)
        path = tmp_path / tuning.file_name(tuning.device_name())
        path.write_text(json.dumps({"device": "x", "configs": {}, "libraries": {"k": "other"}}))
        tuning.measured_on.cache_clear()
        with pytest.raises(ConfigError, match="other"):
            tuning.library_of("k")
    finally:
        tuning.measured_on.cache_clear()
