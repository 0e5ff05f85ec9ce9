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
class AttentionMetadata:
    """One KV group's view of a step.

    ``write_places``: ``[tokens]`` int64. ``decode_tokens``: ``[rows]`` int64 among the step's tokens, None when they
    are all of them in order. ``decode_places``: ``[rows, longest context]`` int64, 0 where a row is shorter or its
    window has passed; ``decode_mask``: the same shape, True where there is something; None when it is all True.
    """

    block_size: int
    write_places: Tensor
    decode_tokens: Tensor | None = None
    decode_places: Tensor | None = None
    decode_mask: Tensor | None = None
    chunks: list[Chunk] = field(default_factory=list)


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
    ends = starts + counts
    firsts = np.concatenate(([0], np.cumsum(counts)))
    row_of = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(firsts[-1]) - firsts[row_of] + starts[row_of]
    write = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    metadata = AttentionMetadata(block_size, torch.from_numpy(write).to(device))
    decodes = np.flatnonzero(counts == 1)
    if len(decodes):
        _add_decodes(metadata, tables[decodes], ends[decodes], window, device)
        if len(decodes) < len(counts):
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


def _places(tables: np.ndarray, context: int, block_size: int) -> np.ndarray:
    blocks = tables[:, : -(-context // block_size)].astype(np.int64)
    places = blocks[:, :, None] * block_size + np.arange(block_size)
    return places.reshape(len(tables), -1)[:, :context]


def _add_decodes(
    metadata: AttentionMetadata, tables: np.ndarray, ends: np.ndarray, window: int, device: torch.device
) -> None:
    longest = int(ends.max())
    places = _places(tables, longest, metadata.block_size)
    columns = np.arange(longest)
    seen = columns < ends[:, None]
    if window:
        seen &= columns >= ends[:, None] - window
    if not seen.all():
        metadata.decode_mask = torch.from_numpy(seen).to(device)
        places = np.where(seen, places, 0)
    metadata.decode_places = torch.from_numpy(np.ascontiguousarray(places)).to(device)


def _chunk_mask(start: int, end: int, window: int) -> np.ndarray | None:
    if start == 0 and (not window or end <= window):
        return None
    queries, keys = np.arange(start, end)[:, None], np.arange(end)
    mask = keys <= queries
    if window:
        mask &= keys > queries - window
    return mask
