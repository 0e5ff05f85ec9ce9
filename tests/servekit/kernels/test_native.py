"""The C++ kernels against plain float64, on every instruction set that this machine has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.kernels.native import Cache, Epilogue, Format, Pool, Program, Rows, native_library, pack
from servekit.kernels.paged_attention import reference
from servekit.kernels.paged_attention.metadata import StepRows, build_metadata

library = native_library()
pytestmark = pytest.mark.skipif(library is None, reason="the CPU kernels were not built")
ISAS = library.supported if library else []
NO_IDS = torch.zeros(0, dtype=torch.int64)
# Relative to the length of a row: bf16 and int8 activations are rounded, float32 ones are not.
TOLERANCE = {Format.F32: 2e-6, Format.BF16: 1.2e-2, Format.I8: 2.5e-2, Format.I4: 2.5e-2}


@pytest.fixture(scope="module", params=ISAS)
def isa(request):
    best = library.isa
    assert library.c.sk_select(request.param.encode())
    yield request.param
    library.c.sk_select(best.encode())


@pytest.fixture(scope="module", params=[1, 2, 4])
def pool(request):
    return Pool(library, request.param)


def unpacked(weight, parts: list[torch.Tensor], *, gated: bool = False) -> torch.Tensor:
    """What ``weight`` stands for, found by multiplying with the unit vectors in float32: ``[out, in]`` float64."""
    width = parts[0].shape[1]
    if weight.format in (Format.F32, Format.BF16):
        whole = torch.cat(parts)
        return (whole.bfloat16() if weight.format is Format.BF16 else whole).double()
    pool = Pool(library, 1)
    eye = torch.eye(width)
    return product(pool, weight, eye).double().T[: sum(map(len, parts))]


def product(pool, weight, x: torch.Tensor, epilogue: Epilogue = Epilogue.STORE, start: torch.Tensor | None = None):
    """``x`` ``[rows, in]`` float32 times a packed weight."""
    columns = weight.matrix.n // (2 if epilogue is Epilogue.SWIGLU else 1)
    inputs, out = Rows.input_of(weight, library, len(x)), Rows(len(x), columns)
    if start is not None:
        out.tensor()[:, : start.shape[1]] = start
    program = Program(library, pool)
    program.convert(None, x.shape[1], inputs)
    program.linear(inputs, weight, out, epilogue)
    program.run_rows(x.contiguous())
    return out.tensor()


sizes = st.tuples(st.integers(1, 67), st.integers(1, 200), st.integers(1, 200))
FORMATS = list(Format)


def check_close(found, exact, x, weights, format):
    """Within what rounding the activations may do: relative to the product of the lengths."""
    bound = x.double().norm(dim=1)[:, None] * weights.norm(dim=1)[None, :] * TOLERANCE[format] + 1e-6
    off = (found.double() - exact).abs()
    assert (off <= bound).all(), f"{(off / bound).max():.2f} of what is allowed"


@settings(max_examples=12, deadline=None)
@given(
    size=sizes, format=st.sampled_from(FORMATS), stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_products_agree_with_float64(isa, pool, size, format, stored):
    rows, out, width = size
    generator = torch.Generator().manual_seed(out * 1000 + width)
    parts = [torch.randn(n, width, generator=generator).to(stored) for n in (out, out // 2 + 1)]
    bias = [torch.randn(len(part), generator=generator) for part in parts]
    x = torch.randn(rows, width, generator=generator)
    weight = pack(library, pool, format, parts, bias)
    exact_weight = unpacked(pack(library, pool, format, parts), [p.float() for p in parts])
    found = product(pool, weight, x)[:, : len(exact_weight)]
    check_close(found, x.double() @ exact_weight.T + torch.cat(bias).double(), x, exact_weight, format)


@settings(max_examples=4, deadline=None)
@given(rows=st.integers(97, 700), width=st.sampled_from([64, 200, 900]), format=st.sampled_from(FORMATS))
def test_many_rows_which_are_cut_into_parts_are_each_what_they_are_alone(isa, pool, rows, width, format):
    torch.manual_seed(rows)
    weight, x = pack(library, pool, format, [torch.randn(100, width)]), torch.randn(rows, width)
    together = product(pool, weight, x)
    for row in {0, rows // 3, rows // 2 - 1, rows // 2, rows - 1}:
        torch.testing.assert_close(together[row], product(pool, weight, x[row : row + 1])[0], rtol=1e-5, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(size=sizes, format=st.sampled_from(FORMATS))
def test_epilogues_add_and_gate(isa, pool, size, format):
    rows, inner, width = size
    generator = torch.Generator().manual_seed(inner * 1000 + width)
    gate, up = (torch.randn(inner, width, generator=generator) / math.sqrt(width) for _ in range(2))
    x, start = torch.randn(rows, width, generator=generator), torch.randn(rows, inner, generator=generator)
    weight = pack(library, pool, format, [gate])
    plain, added = product(pool, weight, x)[:, :inner].clone(), product(pool, weight, x, Epilogue.ADD, start)[:, :inner]
    torch.testing.assert_close(added, plain + start, rtol=1e-5, atol=1e-5)
    both = product(pool, pack(library, pool, format, [gate, up], gated=True), x, Epilogue.SWIGLU)[:, :inner]
    ups = product(pool, pack(library, pool, format, [up]), x)[:, :inner]
    torch.testing.assert_close(both, torch.nn.functional.silu(plain) * ups, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [Format.I8, Format.I4])
def test_quantized_weights_are_near_the_ones_given(format):
    pool = Pool(library, 1)
    whole = torch.randn(70, 100, generator=torch.Generator().manual_seed(0))
    near = unpacked(pack(library, pool, format, [whole]), [whole])
    steps = {Format.I8: 2 * 4 / 254, Format.I4: 2 * 4 / 15}[format]
    assert (near - whole.double()).abs().max() < steps
    assert (near - whole.double()).norm() / whole.norm() < {Format.I8: 0.012, Format.I4: 0.11}[format]


def test_a_row_of_no_numbers_stays_so_and_spoils_no_other(isa):
    pool = Pool(library, 2)
    for format in FORMATS:
        weight = pack(library, pool, format, [torch.randn(70, 96)])
        x = torch.randn(9, 96)
        good = product(pool, weight, x).clone()
        x[4, 50] = float("nan")
        bad = product(pool, weight, x)
        assert torch.isnan(bad[4, :70]).all()
        assert torch.equal(bad[:4], good[:4])
        assert torch.equal(bad[5:], good[5:])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40), width=st.integers(1, 2100), format=st.sampled_from([Format.F32, Format.BF16, Format.I8])
)
def test_norms_agree_with_float64(isa, pool, rows, width, format):
    generator = torch.Generator().manual_seed(width)
    values, scale = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    x, plain = Rows(rows, width), Rows(rows, width)
    x.tensor()[:] = values
    program = Program(library, pool)
    program.norm(x, scale, 1e-5, plain)
    program.run_rows(values)
    exact = torch.nn.functional.rms_norm(values.double(), (width,), scale.double(), 1e-5)
    torch.testing.assert_close(plain.tensor().double(), exact, rtol=1e-5, atol=1e-5)
    eye = pack(library, pool, {Format.I8: Format.I8}.get(format, format), [torch.eye(width)[: min(width, 64)]])
    program = Program(library, pool)
    out, read = Rows(rows, 64), Rows.input_of(eye, library, rows)
    program.norm(x, scale, 1e-5, read)
    program.linear(read, eye, out)
    program.run_rows(values)
    allowed = {Format.F32: 1e-5, Format.BF16: 2**-8, Format.I8: 1 / 120}[format]
    most = exact.abs().max()
    assert (out.tensor()[:, : min(width, 64)].double() - exact[:, :64]).abs().max() <= allowed * most + 1e-5


def step_rows(draw, *, rows: int, block_size: int, window: int, longest: int) -> StepRows:
    """Rows with any number of new tokens after any context; blocks in any order."""
    starts = np.array([draw.integers(0, longest) for _ in range(rows)])
    counts = np.array([draw.choice([1, 1, 2, 5, draw.integers(1, longest)]) for _ in range(rows)])
    blocks = -(-(starts + counts).max() // block_size)
    order = draw.permutation(rows * blocks) + 1
    return StepRows(order.reshape(rows, blocks).astype(np.int32), starts, counts, window)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    heads=st.sampled_from([(4, 4), (9, 3), (8, 1), (16, 1), (3, 1)]),
    width=st.sampled_from([32, 40, 64, 80, 128, 256]),
    block_size=st.sampled_from([8, 16, 32, 64]),
    window=st.sampled_from([0, 0, 1, 7, 100]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    normed=st.booleans(),
)
def test_attention_over_blocks_agrees_with_the_reference(
    isa, pool, seed, heads, width, block_size, window, soft_cap, dtype, normed
):
    """Contexts come in over several steps, by chunks of any size; the last step's answers are compared."""
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    num_heads, kv_heads = heads
    last = step_rows(draw, rows=int(draw.integers(1, 6)), block_size=block_size, window=window, longest=300)
    padded = -(-width // 16) * 16
    num_blocks = last.tables.size + 1
    numbers = torch.zeros((2, num_blocks, block_size, kv_heads, padded), dtype=dtype)
    scales = torch.zeros(numbers.shape[:4]) if dtype == torch.int8 else None
    cache = Cache(numbers, width, 0, scales)
    plain = torch.zeros(2, num_blocks, block_size, kv_heads, width, dtype=torch.float64)
    longest = last.tables.shape[1] * block_size
    angles = torch.cat((torch.randn(longest, width // 2), torch.randn(longest, width // 2)), dim=1) / 2
    norms = (torch.rand(width) + 0.5, torch.rand(width) + 0.5) if normed else None
    found = exact = torch.empty(0)
    starts, whole = np.zeros_like(last.starts), np.full_like(last.starts, longest)
    stale = torch.full((len(starts) * longest, (num_heads + 2 * kv_heads) * width), float("nan"))
    everywhere = StepRows(last.tables, starts, whole, window)
    places = torch.arange(longest).repeat(len(starts))
    native_attention(pool, stale, places, everywhere, cache, angles, norms, num_heads, soft_cap)
    steps = [StepRows(last.tables, starts, last.starts, window), last]
    for rows in steps:
        present = np.flatnonzero(rows.counts)
        if not len(present):
            continue
        rows = StepRows(rows.tables[present], rows.starts[present], rows.counts[present], window)
        tokens = int(rows.counts.sum())
        qkv = torch.randn(tokens, (num_heads + 2 * kv_heads) * width)
        positions = torch.cat([torch.arange(s, s + c) for s, c in zip(rows.starts, rows.counts, strict=True)])
        found = native_attention(pool, qkv, positions, rows, cache, angles, norms, num_heads, soft_cap)
        exact = plain_attention(qkv, positions, rows, plain, angles, norms, num_heads, width, soft_cap, dtype)
    allowed = 2e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), exact.flatten(1), rtol=allowed, atol=allowed)


def native_attention(pool, qkv, positions, rows, cache, angles, norms, num_heads, soft_cap):
    tokens, padded = len(qkv), cache.tensor.shape[-1]
    source, out = Rows(tokens, qkv.shape[1]), Rows(tokens, num_heads * cache.head_dim)
    source.tensor()[:] = qkv
    queries = Rows(tokens, num_heads * padded, cache.queries(library))
    program = Program(library, pool)
    program.rotary(source, num_heads, angles, norms, 1e-6, cache, queries)
    scale = cache.head_dim**-0.5
    program.attention(queries, num_heads, cache, out, scale=scale, soft_cap=soft_cap, window=rows.window)
    program.run(positions.clone(), positions, [rows])
    return out.tensor()


def as_stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` ``[..., width]`` float64 as a cache of ``dtype`` holds it."""
    if dtype != torch.int8:
        return x.to(dtype).double()
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / step).round() * step


def plain_attention(qkv, positions, rows, cache, angles, norms, num_heads, width, soft_cap, dtype):
    block_size, kv_heads = cache.shape[2], cache.shape[3]
    qkv = qkv.double().view(len(qkv), -1, width)
    query, key, value = qkv.split([num_heads, kv_heads, kv_heads], dim=1)
    if norms:
        query, key = (
            torch.nn.functional.rms_norm(x, (width,), norm.double(), 1e-6)
            for x, norm in zip((query, key), norms, strict=True)
        )
    cos, sin = angles[positions].double()[:, None].split(width // 2, dim=-1)

    def turned(x):
        a, b = x.split(width // 2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    query = as_stored(turned(query), torch.bfloat16 if dtype == torch.int8 else dtype)
    key, value = as_stored(turned(key), dtype), as_stored(value, dtype)
    metadata = build_metadata(rows.tables, rows.starts, rows.counts, block_size, rows.window, torch.device("cpu"))
    flat = cache.view(2, -1, kv_heads, width)
    flat[0][metadata.write_places], flat[1][metadata.write_places] = key, value
    return reference.paged_attention(query, cache, metadata, width**-0.5, soft_cap)


@pytest.mark.parametrize("context", [255, 256, 3000])
def test_a_long_context_cut_among_threads_is_one_answer(isa, context):
    """One row on four threads: its keys are cut; on one thread they are not."""
    answers = []
    for threads in (1, 4):
        torch.manual_seed(0)
        cache = Cache(torch.zeros(2, 200, 16, 3, 64), 64, 0)
        angles = torch.ones(context + 1, 64)
        pool = Pool(library, threads)
        tables = np.arange(1, 200, dtype=np.int32)[None]
        for start, count in ((0, context), (context, 1)):
            rows = StepRows(tables, np.array([start]), np.array([count]), 0)
            qkv = torch.randn(count, 15 * 64)
            positions = torch.arange(start, start + count)
            found = native_attention(pool, qkv, positions, rows, cache, angles, None, 9, 0.0)
        answers.append(found)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 3000),
    seed=st.integers(0, 1 << 30),
    broken=st.sampled_from([None, "nan", "inf", "-inf"]),
)
def test_the_highest_of_a_row_is_found_where_it_is_first(isa, pool, rows, cols, seed, broken):
    torch.manual_seed(seed)
    logits = torch.randint(-5, 5, (rows, cols)).float()
    if broken:
        logits[rows // 2, cols // 2] = float(broken)
    ids, highest = np.empty(rows, np.int64), np.empty(rows, np.float32)
    library.c.sk_argmax(pool.handle, logits.data_ptr(), rows, cols, cols, ids.ctypes.data, highest.ctypes.data)
    best, where = logits.max(dim=-1)
    assert ids.tolist() == where.tolist() or broken == "nan"
    torch.testing.assert_close(torch.from_numpy(highest), best, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 3000),
    width=st.sampled_from([40, 700]),
    seed=st.integers(0, 1 << 30),
    format=st.sampled_from([Format.F32, Format.BF16]),
    broken=st.booleans(),
)
def test_the_highest_of_a_product_is_that_of_the_logits_and_the_first(
    isa, pool, rows, cols, width, seed, format, broken
):
    """Small whole numbers: sums are exact in any order, and many are equal."""
    torch.manual_seed(seed)
    x, weights = torch.randint(-2, 3, (rows, width)).float(), torch.randint(-1, 2, (cols, width)).float()
    if broken:
        x[rows // 2, 3] = math.nan
    weight = pack(library, pool, format, [weights])
    inputs = Rows.input_of(weight, library, rows)
    ids, highest = np.full(rows, -1), np.empty(rows, np.float32)
    program = Program(library, pool)
    program.convert(None, width, inputs)
    program.highest(inputs, weight, cols, ids, highest)
    for count in (rows, max(1, rows // 2)):  # nothing of a run is left in the next
        program.run_rows(x[:count])
        logits = x[:count].double() @ weights.double().T
        best, where = logits.max(dim=-1)
        np.testing.assert_array_equal(highest[:count], best.numpy())
        sound = best.isfinite().numpy()
        assert ids[:count][sound].tolist() == where.numpy()[sound].tolist()


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 120), seed=st.integers(0, 1 << 30), data=st.data())
def test_what_is_picked_is_all_that_comes_after(isa, pool, tokens, seed, data):
    picks = np.array(data.draw(st.lists(st.integers(0, tokens - 1), max_size=70)), np.int64)
    torch.manual_seed(seed)
    table, weights = torch.randint(-2, 3, (50, 40)).float(), torch.randint(-2, 3, (300, 40)).float()
    weight, token_ids = pack(library, pool, Format.F32, [weights]), torch.randint(50, (tokens,))
    x, picked = Rows(tokens, 40), Rows.input_of(weight, library, 70)
    ids, highest = np.full(70, -1), np.full(70, np.nan, np.float32)
    program = Program(library, pool)
    program.embed(table, x)
    program.pick(x, 40, picked)
    program.highest(picked, weight, 300, ids, highest)
    empty = np.zeros((1, 1), np.int32)
    rows = [StepRows(empty, np.zeros(1, np.int64), np.array([tokens]), 0)]
    program.run(token_ids, torch.arange(tokens), rows, picks)
    best, where = (table[token_ids[picks]] @ weights.T).max(dim=-1)
    np.testing.assert_array_equal(highest[: len(picks)], best.numpy())
    np.testing.assert_array_equal(ids[: len(picks)], where.numpy())
    assert (ids[len(picks) :] == -1).all()
