"""Where the rows of a step find their keys and values: made once a step, used by every layer of a group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class Chunk:
    """A row that computes more than one token."""

    first: int  # of the step's tokens
    last: int  # exclusive
    places: Tensor  # [context] int64, where each token of the row lies, block * block_size + offset
    mask: Tensor | None  # [last - first, context] bool, True where a token looks; None: plain causal from 0


@dataclass(slots=True)
class KeyTiles:
    """Some query tiles of a step, and for each turn the keys that they meet: what ``deterministic`` reads.

    ``tokens``: ``[tiles, tokens]`` int64 among the step's tokens; the last one is repeated where a tile is short.
    ``is_real``: ``[tiles, tokens]`` bool, False for those repetitions. ``turns``: which of the tiles still meet keys,
    ``[n]``; where these lie, ``[n, keys]``; who looks at whom, ``[n, tokens, keys]`` bool.
    """

    tokens: Tensor
    is_real: Tensor
    turns: list[tuple[Tensor, Tensor, Tensor]]


@dataclass(slots=True)
class StepRows:
    """The rows as ``build_metadata`` was given them."""

    tables: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    window: int


@dataclass(slots=True)
class PagedRows:
    """The rows as kernels that read block tables themselves want them, on their device.

    ``tables``: ``[rows, blocks]`` int32. ``contexts``: ``[rows]`` int32, tokens that a row has with its new ones; 0 for
    a row that only fills up a recorded graph. ``firsts``: ``[rows + 1]`` int32, where each row's tokens begin among the
    step's. ``max_count``, ``max_context``: bounds on a row's new tokens and on its context. ``counts``: on the host.
    """

    tables: Tensor
    contexts: Tensor
    firsts: Tensor
    counts: np.ndarray
    max_count: int
    max_context: int
    window: int
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    def tiles_of(self, num_tokens: int, device: torch.device) -> Tensor:
        """``[tiles, 2]`` int32: each row cut into parts of ``num_tokens``, its number and the first of them.

        The longest rows come first, so that the last programs to start are short ones.
        """
        if num_tokens not in self._tiles:
            parts = -(-self.counts // num_tokens)
            order = np.argsort(-self.counts, kind="stable")
            rows = np.repeat(order, parts[order])
            ends = np.cumsum(parts[order])
            firsts = (np.arange(len(rows)) - np.repeat(ends - parts[order], parts[order])) * num_tokens
            self._tiles[num_tokens] = to_device(np.stack((rows, firsts), axis=1).astype(np.int32), device)
        return self._tiles[num_tokens]


@dataclass(slots=True)
class AttentionMetadata:
    """One KV group's view of a step.

    ``write_places``: ``[tokens]`` int64. ``decode_tokens``: ``[rows]`` int64 among the step's tokens, None when they
    are all of them in order. ``decode_tables``: ``[rows, blocks of the longest context]`` int64, 0 where a row is short
    or its window has passed; ``decode_mask``: ``[rows, blocks * block_size]`` bool, True where a token looks; None when
    it is all True. ``decode_partial``: the blocks of which a row sees a part: row, column of the table, and
    ``[blocks, block_size]`` True where it does not look, for there may be anything. ``rows`` and ``tiles`` are for
    implementations that cut the step otherwise; ``tiles`` is filled by the first layer that does. ``paged``: for
    those that read block tables.
    """

    block_size: int
    write_places: Tensor
    decode_tokens: Tensor | None = None
    decode_tables: Tensor | None = None
    decode_mask: Tensor | None = None
    decode_partial: tuple[Tensor, Tensor, Tensor] | None = None
    chunks: list[Chunk] = field(default_factory=list)
    rows: StepRows | None = None
    tiles: dict[tuple[int, ...], list[KeyTiles]] = field(default_factory=dict)
    paged: PagedRows | None = None


def build_metadata(
    tables: np.ndarray, starts: np.ndarray, counts: np.ndarray, block_size: int, window: int, device: torch.device
) -> AttentionMetadata:
    """The metadata of one group.

    Args:
        tables: ``[rows, max_blocks]`` the block tables of the step's rows.
        starts: ``[rows]`` the position of each row's first new token.
        counts: ``[rows]`` how many tokens each row computes.
        window: tokens that a token sees, itself included; 0 for all.
    """
    given = StepRows(tables, starts, counts, window)
    ends = starts + counts
    if len(counts) == int(counts.sum()):
        rows = np.arange(len(counts))
        write = tables[rows, starts // block_size].astype(np.int64) * block_size + starts % block_size
        metadata = AttentionMetadata(block_size, torch.from_numpy(write).to(device), rows=given)
        _add_decodes(metadata, tables, ends, window, device)
        return metadata
    firsts = np.concatenate(([0], np.cumsum(counts)))
    row_of = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(firsts[-1]) - firsts[row_of] + starts[row_of]
    write = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    metadata = AttentionMetadata(block_size, torch.from_numpy(write).to(device), rows=given)
    decodes = np.flatnonzero(counts == 1)
    if len(decodes):
        _add_decodes(metadata, tables[decodes], ends[decodes], window, device)
        metadata.decode_tokens = torch.from_numpy(firsts[decodes]).to(device)
    for row in np.flatnonzero(counts > 1):
        places = _places(tables[row : row + 1], int(ends[row]), block_size)[0]
        mask = _chunk_mask(int(starts[row]), int(ends[row]), window)
        if mask is not None:
            places = np.where(mask.any(axis=0), places, 0)
        metadata.chunks.append(
            Chunk(
                int(firsts[row]),
                int(firsts[row + 1]),
                torch.from_numpy(places).to(device),
                None if mask is None else torch.from_numpy(mask).to(device),
            )
        )
    return metadata


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` there: on a CPU as it is, to a GPU by pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def paged_rows(rows: StepRows, device: torch.device) -> PagedRows:
    """As the rows stand: their tables, contexts and first tokens."""
    contexts = rows.starts + rows.counts
    firsts = np.concatenate(([0], np.cumsum(rows.counts)))
    return PagedRows(
        to_device(rows.tables.astype(np.int32, copy=False), device),
        to_device(contexts.astype(np.int32), device),
        to_device(firsts.astype(np.int32), device),
        rows.counts,
        int(rows.counts.max()),
        int(contexts.max()),
        rows.window,
    )


def paged_metadata(
    tables: np.ndarray, starts: np.ndarray, counts: np.ndarray, block_size: int, window: int, device: torch.device
) -> AttentionMetadata:
    """As ``build_metadata``, with nothing but what kernels need that read block tables themselves."""
    given = StepRows(tables, starts, counts, window)
    firsts = np.concatenate(([0], np.cumsum(counts)))
    row_of = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(firsts[-1]) - firsts[row_of] + starts[row_of]
    write = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return AttentionMetadata(block_size, to_device(write, device), rows=given, paged=paged_rows(given, device))


def _places(tables: np.ndarray, context: int, block_size: int) -> np.ndarray:
    blocks = tables[:, : -(-context // block_size)].astype(np.int64)
    places = blocks[:, :, None] * block_size + np.arange(block_size)
    return places.reshape(len(tables), -1)[:, :context]


def _add_decodes(
    metadata: AttentionMetadata, tables: np.ndarray, ends: np.ndarray, window: int, device: torch.device
) -> None:
    size = metadata.block_size
    num_blocks = -(-int(ends.max()) // size)
    positions = np.arange(num_blocks * size)
    seen = positions < ends[:, None]
    blocks, lasts = np.arange(num_blocks), (ends - 1) // size
    used = np.less_equal(blocks, lasts[:, None])
    partial = np.logical_and(blocks == lasts[:, None], (ends % size > 0)[:, None])
    if window:
        seen &= positions >= ends[:, None] - window
        of_block = seen.reshape(len(ends), num_blocks, size)
        used = np.any(of_block, axis=2)
        partial = np.logical_and(used, ~np.all(of_block, axis=2))
    metadata.decode_tables = torch.from_numpy(np.where(used, tables[:, :num_blocks], 0).astype(np.int64)).to(device)
    if seen.all():
        return
    metadata.decode_mask = torch.from_numpy(seen).to(device)
    row, column = np.nonzero(partial)
    unseen = ~seen.reshape(len(ends), num_blocks, size)[row, column]
    parts = (torch.from_numpy(part).to(device) for part in (row, column, unseen))
    metadata.decode_partial = (next(parts), next(parts), next(parts))


def _chunk_mask(start: int, end: int, window: int) -> np.ndarray | None:
    if start == 0 and (not window or end <= window):
        return None
    queries, keys = np.arange(start, end)[:, None], np.arange(end)
    mask = keys <= queries
    if window:
        mask &= keys > queries - window
    return mask
