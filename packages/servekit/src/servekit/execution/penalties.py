"""What the penalties of a batch count: the tokens of each request's output, and which occur in its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from servekit.kernels.paged_attention.metadata import to_device

SMALLEST = 4  # requests that there is room for from the first on


class PenaltyTable:
    """Occurrences for the requests that have penalties, on the device; it grows with the most that there were at once.

    ``counts``: ``[requests, vocab]`` int32, of the output. ``in_prompt``: ``[requests, vocab]`` bool.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.empty((0, vocab_size), dtype=torch.int32, device=device)
        self.in_prompt = torch.empty((0, vocab_size), dtype=torch.bool, device=device)
        self._free: list[int] = []

    def add(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """A row for a request: its number, until ``remove`` is told of it."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        prompt, output = (to_device(np.asarray(ids, np.int64), self.counts.device) for ids in (prompt_ids, output_ids))
        self.in_prompt[row].zero_().index_fill_(0, prompt, True)
        self.counts[row].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return row

    def remove(self, row: int) -> None:
        self._free.append(row)

    def count(self, rows: Tensor, tokens: Tensor) -> None:
        """One more token for each of ``rows``, of which none occurs twice; both ``[n]`` int64."""
        self.counts[rows, tokens] += 1

    def _grow(self) -> None:
        have = len(self.counts)
        more = max(have, SMALLEST)
        self.counts = torch.cat((self.counts, self.counts.new_zeros(more, self.counts.shape[1])))
        self.in_prompt = torch.cat((self.in_prompt, self.in_prompt.new_zeros(more, self.in_prompt.shape[1])))
        self._free.extend(range(have + more - 1, have - 1, -1))
