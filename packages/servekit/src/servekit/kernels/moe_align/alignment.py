"""Rows of a grouped product."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Which pair is in which row, and whose weights a tile of rows meets.

    ``pairs``: ``[capacity]`` int32, ``token * top_k + slot``; the number of pairs where a row is padding.
    ``experts``: ``[capacity / rows]`` int32, the expert of each tile; tiles from ``num_rows`` on have none.
    ``num_rows``: ``[1]`` int32 on the device, rows in use, a multiple of ``rows``. ``rows``: of a tile.
    """

    pairs: Tensor
    experts: Tensor
    num_rows: Tensor
    rows: int


def capacity(num_pairs: int, num_experts: int, rows: int) -> int:
    """Rows that are enough however the pairs are spread, a multiple of ``rows``: known without asking the device."""
    most = num_pairs + min(num_experts, num_pairs) * (rows - 1)
    return -(-most // rows) * rows
