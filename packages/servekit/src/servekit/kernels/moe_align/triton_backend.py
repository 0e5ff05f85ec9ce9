"""Aligning by Triton, without a word to the host: count, add up, place. A stable counting sort, so no atomics.

Chunks of pairs are counted by expert; one program turns the counts into each chunk's first row for each expert; then
each chunk puts its pairs in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work
from servekit.kernels.moe_align.alignment import Alignment, capacity

PAIRS = 64  # of a chunk
CHUNKS = 32  # added up at a time
TILES = 64  # named by a program


@triton.jit(do_not_specialize=["num_pairs"])
def _count(experts_ptr, counts_ptr, num_pairs, num_experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """``counts``: ``[chunks, EXPERTS]``."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    mine = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1)
    real = (mine >= 0) & (mine < num_experts)
    counts = tl.histogram(tl.where(real, mine, 0), EXPERTS, mask=real)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["chunks"])
def _add_up(
    counts_ptr,
    ends_ptr,
    num_rows_ptr,
    chunks,
    num_experts,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Counts become first rows, in place; ``ends``: ``[EXPERTS]``, the row after each expert's last."""
    columns = tl.arange(0, EXPERTS)
    totals = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first_chunk in range(0, chunks, CHUNKS):
        some = first_chunk + tl.arange(0, CHUNKS)
        real = (some < chunks)[:, None] & (columns < num_experts)[None, :]
        totals += tl.sum(tl.load(counts_ptr + some[:, None] * EXPERTS + columns[None, :], mask=real, other=0), axis=0)
    padded = tl.cdiv(totals, ROWS) * ROWS
    ends = tl.cumsum(padded, axis=0)
    tl.store(ends_ptr + columns, ends)
    tl.store(num_rows_ptr, tl.sum(padded, axis=0))
    first = ends - padded
    for first_chunk in range(0, chunks, CHUNKS):
        some = first_chunk + tl.arange(0, CHUNKS)
        real = (some < chunks)[:, None] & (columns < num_experts)[None, :]
        places = counts_ptr + some[:, None] * EXPERTS + columns[None, :]
        counts = tl.load(places, mask=real, other=0)
        tl.store(places, first[None, :] + tl.cumsum(counts, axis=0) - counts, mask=real)
        first += tl.sum(counts, axis=0)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "chunks"])
def _place(
    experts_ptr,
    firsts_ptr,
    ends_ptr,
    pairs_ptr,
    tiles_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    chunks,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The first ``chunks`` programs place pairs; the others name the experts of some tiles."""
    program = tl.program_id(0)
    if program < chunks:
        places = tl.arange(0, PAIRS)
        pairs = program * PAIRS + places
        mine = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1)
        others = tl.load(experts_ptr + program * PAIRS + places, mask=pairs < num_pairs, other=-1)
        before = (mine[:, None] == others[None, :]) & (places[None, :] < places[:, None])
        rank = tl.sum(before.to(tl.int32), axis=1)
        real = (mine >= 0) & (mine < num_experts)
        first = tl.load(firsts_ptr + program * EXPERTS + mine, mask=real, other=0)
        tl.store(pairs_ptr + first + rank, pairs, mask=real)
    else:
        tiles = (program - chunks) * TILES + tl.arange(0, TILES)
        columns = tl.arange(0, EXPERTS)
        ends = tl.load(ends_ptr + columns, mask=columns < num_experts, other=2147483647)
        passed = (ends[None, :] <= (tiles * ROWS)[:, None]).to(tl.int32)
        expert = tl.sum(passed, axis=1)
        tl.store(tiles_ptr + tiles, tl.where(expert < num_experts, expert, -1), mask=tiles < num_tiles)


def align(experts: Tensor, num_experts: int, rows: int) -> Alignment:
    """As ``reference.align``."""
    flat = experts.contiguous().view(-1)
    num_pairs = len(flat)
    device = flat.device
    pairs = torch.full((capacity(num_pairs, num_experts, rows),), num_pairs, dtype=torch.int32, device=device)
    tiles = torch.full((len(pairs) // rows,), -1, dtype=torch.int32, device=device)
    num_rows = torch.zeros(1, dtype=torch.int32, device=device)
    if not num_pairs:
        return Alignment(pairs, tiles, num_rows, rows)
    wide = triton.next_power_of_2(num_experts)
    chunks = triton.cdiv(num_pairs, PAIRS)
    counts = torch.empty(chunks, wide, dtype=torch.int32, device=device)
    ends = torch.empty(wide, dtype=torch.int32, device=device)
    _count[(chunks,)](flat, counts, num_pairs, num_experts, PAIRS=PAIRS, EXPERTS=wide)
    _add_up[(1,)](counts, ends, num_rows, chunks, num_experts, ROWS=rows, EXPERTS=wide, CHUNKS=CHUNKS, num_warps=8)
    _place[(chunks + triton.cdiv(len(tiles), TILES),)](
        flat,
        counts,
        ends,
        pairs,
        tiles,
        num_pairs,
        num_experts,
        len(tiles),
        chunks,
        ROWS=rows,
        PAIRS=PAIRS,
        EXPERTS=wide,
        TILES=TILES,
    )
    return Alignment(pairs, tiles, num_rows, rows)


_SIZES = {"num_pairs": "i32", "num_experts": "i32", "chunks": "i32"}

SPECIALIZATIONS = (
    Specialization(
        kernel=_count,
        name="256 experts",
        signature={"experts_ptr": "*i32", "counts_ptr": "*i32", "num_pairs": "i32"} | {"num_experts": "i32"},
        constants={"PAIRS": PAIRS, "EXPERTS": 256},
    ),
    Specialization(
        kernel=_add_up,
        name="256 experts, tiles of 128 rows",
        signature={"counts_ptr": "*i32", "ends_ptr": "*i32", "num_rows_ptr": "*i32", "chunks": "i32"}
        | {"num_experts": "i32"},
        constants={"ROWS": 128, "EXPERTS": 256, "CHUNKS": CHUNKS},
        num_warps=8,
    ),
    Specialization(
        kernel=_place,
        name="256 experts, tiles of 128 rows",
        signature={"experts_ptr": "*i32", "firsts_ptr": "*i32", "ends_ptr": "*i32", "pairs_ptr": "*i32"}
        | {"tiles_ptr": "*i32", "num_tiles": "i32"}
        | _SIZES,
        constants={"ROWS": 128, "PAIRS": PAIRS, "EXPERTS": 256, "TILES": TILES},
    ),
)

WORKS = (
    Work(
        operation="moe_align (align)",
        shape="8192 tokens, 8 of 256 experts, tiles of 128 rows",
        bytes=8192 * 8 * 4 * 3 + 8192 * 8 // PAIRS * 256 * 4 * 4,
        flops=8192 * 8 * (PAIRS + 256),
        bound="bandwidth",
        target=0.1,
    ),
)
