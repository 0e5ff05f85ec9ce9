"""Paged attention that gives a token the same bits whatever its batch, its chunk and its place in either.

Keys are met in tiles of 64 positions, counted from the start of the text, and the tiles are put together in that order
by the online softmax (Milakov and Gimelshein 2018). Tiles that a token does not see change nothing: they add 0 and
multiply by 1. All but the two matrix products is elementwise, and these run in shapes that were seen to agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from servekit.kernels.agreeing import Shape, agreeing_shapes, next_size
from servekit.kernels.exact_ops import exp, sum_last, tanh
from servekit.kernels.paged_attention.metadata import AttentionMetadata, KeyTiles, StepRows

TILE = 64  # positions of keys
CHUNK_TOKENS = 16  # of a chunk that meet a tile of keys together
BATCHES = (64, 16, 4, 1)  # products in a call
MIN_ROWS = 4  # of a product: with fewer, libraries go other ways
NOTHING = -1e30  # below every score, and finite: -inf less -inf is no number


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of the products: how many in a call, of how many tokens of a chunk, and of a row that computes one."""

    chunk_batches: tuple[int, ...]
    chunk_tokens: int
    single_batches: tuple[int, ...]
    single_tokens: int


def paged_attention(
    query: Tensor, cache: Tensor, metadata: AttentionMetadata, scale: float, soft_cap: float = 0.0
) -> Tensor:
    """As ``reference.paged_attention``.

    Raises:
        ValueError: the metadata was not made by ``build_metadata``.
    """
    if metadata.rows is None:
        raise ValueError("deterministic attention needs metadata.rows, which build_metadata fills")
    heads, width = query.shape[1:]
    shapes = agreeing(heads // cache.shape[3], width, query.device, torch.get_num_threads())
    key = (shapes.single_tokens, shapes.chunk_tokens)
    if key not in metadata.tiles:
        metadata.tiles[key] = _cut(metadata.rows, key, metadata.block_size, query.device)
    out = torch.empty_like(query)
    batches = (shapes.single_batches, shapes.chunk_batches)
    for tiles, sizes in zip(metadata.tiles[key], batches, strict=True):
        if len(tiles.tokens):
            found = _attend(query, cache, tiles, sizes, scale, soft_cap)
            out[tiles.tokens[tiles.is_real]] = found[tiles.is_real].to(query.dtype)
    return out


def _attend(
    query: Tensor, cache: Tensor, tiles: KeyTiles, sizes: tuple[int, ...], scale: float, soft_cap: float
) -> Tensor:
    """``[tiles, tokens, heads, head_dim]`` float32, tile of keys after tile of keys."""
    keys, values = cache.view(2, -1, *cache.shape[3:]).unbind(0)
    kv_heads, width = keys.shape[1:]
    num_tiles, tokens = tiles.tokens.shape
    groups = query.shape[1] // kv_heads
    q = _rows_of(query, tiles.tokens, kv_heads)  # [tiles, kv_heads, rows, head_dim]
    highest = q.new_full((*q.shape[:3], 1), NOTHING)
    total = torch.zeros_like(highest)
    out = torch.zeros_like(q)
    for active, places, seen in tiles.turns:
        shape = (len(active), kv_heads, q.shape[2], -1)
        k, v = (half[places].transpose(1, 2).reshape(-1, TILE, width).float() for half in (keys, values))
        scores = _products(q[active].flatten(0, 1), k.transpose(1, 2), sizes) * scale
        if soft_cap:
            scores = tanh(scores / soft_cap) * soft_cap
        scores = scores.view(shape).masked_fill_(_hidden(seen, groups, q.shape[2]), float("-inf"))
        before = highest[active]
        now = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
        shares, fade = exp(scores - now), exp(before - now)
        highest[active] = now
        total[active] = total[active] * fade + sum_last(shares)
        out[active] = out[active] * fade + _products(shares.flatten(0, 1), v, sizes).view(shape)
    real = (out / total)[:, :, : tokens * groups]
    real = real.view(num_tiles, kv_heads, tokens, groups, width).transpose(1, 2)
    return real.reshape(num_tiles, tokens, kv_heads * groups, width)


def _rows_of(query: Tensor, tokens: Tensor, kv_heads: int) -> Tensor:
    """The queries that share a KV head, token after token, as the rows of one matrix; zeros fill it up."""
    tiles, count = tokens.shape
    heads, width = query.shape[1:]
    groups = heads // kv_heads
    picked = query[tokens].float().view(tiles, count, kv_heads, groups, width).transpose(1, 2)
    rows = query.new_zeros((tiles, kv_heads, _num_rows(groups, count), width), dtype=torch.float32)
    rows[:, :, : count * groups] = picked.reshape(tiles, kv_heads, count * groups, width)
    return rows


def _hidden(seen: Tensor, groups: int, rows: int) -> Tensor:
    """``[n, 1, rows, keys]``: where a row of queries does not look. The rows that fill up look at everything."""
    hidden = torch.zeros((len(seen), 1, rows, seen.shape[-1]), dtype=torch.bool, device=seen.device)
    hidden[:, 0, : seen.shape[1] * groups] = ~seen.repeat_interleave(groups, dim=1)
    return hidden


def _products(left: Tensor, right: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``left @ right`` of ``[n, ...]`` float32, in calls of as many products as ``sizes`` allow."""
    out = left.new_empty(len(left), left.shape[1], right.shape[2])
    first = 0
    while first < len(left):
        size = next_size(len(left) - first, sizes)
        part = slice(first, first + size)
        out[part] = torch.bmm(_whole(left[part], size), _whole(right[part], size))[: len(left[part])]
        first += size
    return out


def _whole(matrices: Tensor, size: int) -> Tensor:
    """In memory of their own, with zeros behind; what is transposed stays so, for libraries look at that as well."""
    if matrices.stride(-1) == 1:
        tile = matrices.new_zeros(size, *matrices.shape[1:])
    else:
        tile = matrices.new_zeros(size, matrices.shape[2], matrices.shape[1]).transpose(1, 2)
    tile[: len(matrices)] = matrices
    return tile


def _num_rows(groups: int, tokens: int) -> int:
    return -(-groups * tokens // MIN_ROWS) * MIN_ROWS


def _cut(rows: StepRows, tokens: tuple[int, int], block_size: int, device: torch.device) -> list[KeyTiles]:
    """Rows that compute one token, and chunks: each as tiles of so many ``tokens``."""
    offsets = np.cumsum(rows.counts) - rows.counts
    found = []
    for is_chunk, size in zip((False, True), tokens, strict=True):
        chosen = np.flatnonzero((rows.counts > 1) == is_chunk)
        firsts = [np.arange(0, rows.counts[row], size) for row in chosen]
        row_of = np.repeat(chosen, [len(first) for first in firsts])
        first = np.concatenate([np.zeros(0, np.int64), *firsts])[:, None]
        steps = first + np.arange(size)
        last = rows.counts[row_of][:, None] - 1
        own = np.minimum(steps, last)
        turns = _turns(rows, row_of, rows.starts[row_of][:, None] + own, block_size, device)
        places, real = (torch.from_numpy(a).to(device) for a in (offsets[row_of][:, None] + own, steps <= last))
        found.append(KeyTiles(places, real, turns))
    return found


def _turns(
    rows: StepRows, row_of: np.ndarray, positions: np.ndarray, block_size: int, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The keys that query tiles at ``positions`` ``[tiles, tokens]`` meet, turn after turn."""
    if not len(positions):
        return []
    window = rows.window or int(positions.max()) + 1
    first = np.maximum(positions.min(axis=1) - window + 1, 0) // TILE
    count = positions.max(axis=1) // TILE + 1 - first
    turns = []
    for turn in range(int(count.max())):
        active = np.flatnonzero(count > turn)
        keys = (first[active] + turn)[:, None] * TILE + np.arange(TILE)
        own = positions[active][:, :, None]
        seen = (keys[:, None] <= own) & (keys[:, None] > own - window)
        blocks = np.minimum(keys // block_size, rows.tables.shape[1] - 1)
        places = rows.tables[row_of[active][:, None], blocks].astype(np.int64) * block_size + keys % block_size
        places = np.where(seen.any(axis=1), places, 0)  # block 0 is always finite
        whose, where, looks = (torch.from_numpy(a).to(device) for a in (active, places, seen))
        turns.append((whose, where, looks))
    return turns


@lru_cache
def agreeing(groups: int, width: int, device: torch.device, num_threads: int) -> Shapes:
    """The shapes of this machine in which a query has the same bits everywhere.

    Args:
        groups: queries that share a KV head.
        num_threads: of torch; only that the answer is not taken for another number of them.

    Cost: a few thousand small products, once.
    """
    chunk, single = _num_rows(groups, CHUNK_TOKENS), _num_rows(groups, 1)
    shapes = [(batch, rows) for rows in (chunk, single) for batch in BATCHES]
    generator = torch.Generator().manual_seed(0)
    found = shapes
    for inner, outer in ((width, TILE), (TILE, width)):
        bank = torch.randn(math.prod(shapes[0]), inner, generator=generator).to(device)
        right = torch.randn(1, inner, outer, generator=generator).to(device)
        if outer == TILE:  # keys come transposed
            right = right.transpose(1, 2).contiguous().transpose(1, 2)

        def product(ids: Tensor, shape: Shape, bank: Tensor = bank, right: Tensor = right) -> Tensor:
            left = bank[ids].view(*shape, -1)
            return torch.bmm(left, _whole(right.expand(shape[0], -1, -1), shape[0])).flatten(0, 1)

        agreed = agreeing_shapes(product, shapes, device)
        found = [shape for shape in found if shape in agreed]
    of_chunks = tuple(batch for batch, rows in found if rows == chunk)
    of_singles = tuple(batch for batch, rows in found if rows == single)
    if not of_chunks:
        return Shapes(of_singles or (1,), 1, of_singles or (1,), 1)
    if not of_singles:
        return Shapes(of_chunks, CHUNK_TOKENS, of_chunks, CHUNK_TOKENS)
    return Shapes(of_chunks, CHUNK_TOKENS, of_singles, 1)
