"""Aligning in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.moe_align.alignment import Alignment, capacity


def align(experts: Tensor, num_experts: int, rows: int) -> Alignment:
    """Sort pairs by expert, in the order of their tokens, and pad each expert's to a multiple of ``rows``.

    Args:
        experts: ``[tokens, top_k]`` int32; pairs whose expert is outside ``0..num_experts - 1`` are another rank's
            and get no row.
        rows: of a tile.
    """
    flat = experts.reshape(-1).long()
    pairs = torch.full((capacity(len(flat), num_experts, rows),), len(flat), dtype=torch.int32, device=flat.device)
    tiles = torch.full((len(pairs) // rows,), -1, dtype=torch.int32, device=flat.device)
    first = 0
    for expert in range(num_experts):
        found = torch.nonzero(flat == expert).flatten()
        last = first + -(-len(found) // rows) * rows
        pairs[first : first + len(found)] = found.to(torch.int32)
        tiles[first // rows : last // rows] = expert
        first = last
    return Alignment(pairs, tiles, torch.tensor([first], dtype=torch.int32, device=flat.device), rows)
