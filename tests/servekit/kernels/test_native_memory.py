"""Memory of packed weights, and threads that stay on their cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from servekit.kernels.native import Epilogue, Format, Pool, Program, Rows, native_library, pack
from servekit.kernels.native.memory import ALIGNMENT, Arena

library = native_library()


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_parts_of_an_arena_are_apart_aligned_and_zero(sizes):
    arena = Arena(area=1 << 12)
    parts = [arena.take(size) for size in sizes]
    for i, part in enumerate(parts):
        assert len(part) == sizes[i]
        assert not len(part) or part.ctypes.data % ALIGNMENT == 0
        assert not part.any()
        part[:] = i + 1
    assert all((part == i + 1).all() for i, part in enumerate(parts))


@pytest.mark.skipif(library is None, reason="the CPU kernels were not built")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pinned_threads_compute_the_same(monkeypatch, threads):
    weight, x = torch.randn(192, 600), torch.randn(20, 600)
    found = []
    for pinned in ("0", "1"):
        monkeypatch.setenv("SERVEKIT_CPU_PIN", pinned)
        pool = Pool(library, threads)
        packed = pack(library, pool, Format.F32, [weight])
        inputs, out = Rows.input_of(packed, library, 20), Rows(20, 192)
        program = Program(library, pool)
        program.convert(None, 600, inputs)
        program.linear(inputs, packed, out, Epilogue.STORE)
        program.run_rows(x)
        found.append(out.tensor().clone())
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(library is None, reason="the CPU kernels were not built")
@pytest.mark.parametrize("format", list(Format))
def test_the_operations_of_a_peak_grow_with_its_rounds(format):
    pool = Pool(library, 2)
    once, thrice = (library.c.sk_peak(pool.handle, format, rounds) for rounds in (10, 30))
    assert once > 0
    assert np.isclose(thrice, 3 * once)
