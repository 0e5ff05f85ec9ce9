"""All that serving launches, launched once before the first request: nobody waits for a kernel to be compiled.

A kernel is compiled anew for other constants, and some of those follow from a step's size: how high a tile of attention
is, into how many splits a context is cut, how the rows of a product with few bits are. These sizes meet all of them;
``tests/servekit/kernels/test_warm_up_on_triton.py`` holds the engine to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from servekit.core.facts import KVGroup
from servekit.kernels.paged_attention.metadata import StepRows
from servekit.layers.attention import MetadataBuilder, StepInputs

SHORTEST_SPLIT = 256  # tokens of a context, or more, for each split: one less would be no other kernel


def step_sizes(max_tokens: int, max_model_len: int) -> Iterator[tuple[int, int]]:
    """``(new tokens, context)`` of one row: prompts of each power of two, and a token after contexts of each."""
    most = min(max_tokens, max_model_len)
    for count in _doubled(2, most):
        yield count, count
    for context in (1, *_doubled(2 * SHORTEST_SPLIT, max_model_len)):
        yield 1, context


def _doubled(first: int, most: int) -> Iterator[int]:
    """``first`` and its doubles below ``most``, and ``most`` itself."""
    while first < most:
        yield first
        first *= 2
    yield most


def null_step(
    groups: list[KVGroup], count: int, context: int, block_size: int, build: MetadataBuilder, device: torch.device
) -> StepInputs:
    """A row of ``count`` new tokens at the end of ``context``, all of it in the null block, which nobody reads."""
    counts, starts = np.asarray([count]), np.asarray([context - count])
    tables = np.zeros((1, -(-context // block_size)), np.int32)
    rows = [StepRows(tables, starts, counts, group.window) for group in groups]
    zeros = torch.zeros(count, dtype=torch.int64, device=device)  # of positions too: a step may be longer than a row
    return StepInputs(zeros, zeros, rows, block_size, build=build)
