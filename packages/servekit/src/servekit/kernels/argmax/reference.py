"""The most likely tokens by torch."""

from __future__ import annotations

from torch import Tensor


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``logits`` ``[rows, vocab]`` -> the highest of each row, not finite where none can be told, and its id."""
    highest, ids = logits.max(dim=-1)
    return highest, ids
