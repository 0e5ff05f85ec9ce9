"""Experts by the C++ kernels: they are the reference's, and every pair is computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.servekit.kernels.test_fused_moe import SHAPES, make_inputs

from servekit.kernels.fused_moe import reference
from servekit.kernels.fused_moe.native_experts import CAPACITY, NativeExperts, parts_of
from servekit.kernels.native import Format, native_library
from servekit.kernels.native.library import Pool

needs_native = pytest.mark.skipif(native_library() is None, reason="the C++ kernels were not built")


@needs_native
@pytest.mark.parametrize(
    ("format", "tolerance"), [(Format.F32, 2e-5), (Format.BF16, 3e-2), (Format.I8, 5e-2), (Format.I4, 0.4)]
)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 2, 3, 64, 40), (700, 2, 4, 64, 40)], ids=str)
def test_experts_of_the_cpu_kernels_are_the_references(format, tolerance, shape):
    """Also where an expert has more rows than are computed at a time, or all together, and some are another rank's."""
    library = native_library()
    x, experts, weights, gate_up, down = make_inputs(*shape, torch.float32, "dense")
    experts = torch.where(experts == 1, -1, experts)
    pool = Pool(library, 1)
    found = NativeExperts(library, pool, gate_up.values, down.values, format)(x, experts, weights, x)
    wanted = reference.fused_moe(x, experts, weights, gate_up, down, x)
    assert float((found - wanted).norm() / (wanted - x).norm().clamp(min=1e-6)) < tolerance


@given(st.lists(st.integers(0, 700), min_size=1, max_size=6), st.integers(1, 900))
def test_pairs_are_computed_once_each_by_their_own_expert_a_few_at_a_time(counts, together):
    ends = torch.tensor(counts).cumsum(0).tolist()
    done = []
    for first in range(0, ends[-1], together):
        for expert, begin, end in parts_of(ends, first, min(first + together, ends[-1])):
            assert 0 < end - begin <= CAPACITY
            done += [(pair, expert) for pair in range(begin, end)]
    assert done == [(pair, expert) for pair, expert in enumerate(np.repeat(np.arange(len(counts)), counts).tolist())]
