"""Aligning: every pair has exactly one row, in a tile of its own expert, and nothing else has any."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends

ALIGN = backends("servekit.kernels.moe_align", "align")
FIELDS = ("pairs", "experts", "num_rows")


def check(align, experts, num_experts, rows):
    found = align(experts.to(DEVICE), num_experts, rows)
    flat = experts.reshape(-1).tolist()
    used = int(found.num_rows)
    assert used % rows == 0
    assert len(found.pairs) >= used
    assert len(found.experts) * rows == len(found.pairs)
    in_rows = found.pairs.tolist()
    placed = [pair for pair in in_rows if pair != len(flat)]
    assert sorted(placed) == [pair for pair, expert in enumerate(flat) if 0 <= expert < num_experts]  # exactly once
    assert all(pair == len(flat) for pair in in_rows[used:])
    for row, pair in enumerate(in_rows[:used]):
        if pair != len(flat):
            assert int(found.experts[row // rows]) == flat[pair]
    wasted = used - len(placed)
    assert wasted <= len(set(placed and [flat[pair] for pair in placed])) * (rows - 1)
    assert placed == sorted(placed, key=lambda pair: (flat[pair], pair))  # in the order of the tokens


@pytest.mark.parametrize("backend", list(ALIGN))
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "rows"),
    [(0, 2, 4, 16), (1, 1, 1, 16), (1, 8, 128, 16), (33, 4, 60, 16), (70, 2, 3, 32), (300, 1, 7, 64)],
)
def test_every_pair_has_one_row(backend, tokens, top_k, num_experts, rows):
    generator = torch.Generator().manual_seed(0)
    check(
        ALIGN[backend],
        torch.randint(0, num_experts, (tokens, top_k), generator=generator, dtype=torch.int32),
        num_experts,
        rows,
    )


@pytest.mark.parametrize("backend", list(ALIGN))
@pytest.mark.parametrize("expert", [0, 4, 8])
def test_one_expert_gets_all(backend, expert):
    check(ALIGN[backend], torch.full((50, 2), expert, dtype=torch.int32), 9, 16)


@pytest.mark.parametrize("backend", list(ALIGN))
def test_other_ranks_pairs_get_no_row(backend):
    generator = torch.Generator().manual_seed(0)
    check(ALIGN[backend], torch.randint(-1, 12, (40, 3), generator=generator, dtype=torch.int32), 5, 16)


def test_any_routing():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(st.data())
    def try_one(data):
        num_experts = data.draw(st.integers(1, 20))
        top_k = data.draw(st.integers(1, 4))
        experts = data.draw(st.lists(st.lists(st.integers(-1, num_experts), min_size=top_k, max_size=top_k)))
        given = torch.tensor(experts, dtype=torch.int32).view(-1, top_k)
        check(ALIGN["reference"], given, num_experts, data.draw(st.sampled_from([1, 3, 16])))

    try_one()


@pytest.mark.skipif("triton" not in ALIGN, reason="kernels are interpreted in another session")
def test_triton_aligns_any_routing_as_the_reference_does():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        st.integers(0, 90), st.integers(1, 4), st.integers(1, 40), st.sampled_from([16, 32]), st.integers(0, 999)
    )
    def try_one(tokens, top_k, num_experts, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        experts = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator, dtype=torch.int32)
        wanted = ALIGN["reference"](experts, num_experts, rows)
        found = ALIGN["triton"](experts.to(DEVICE), num_experts, rows)
        assert all(torch.equal(getattr(found, name).cpu(), getattr(wanted, name)) for name in FIELDS)

    try_one()
