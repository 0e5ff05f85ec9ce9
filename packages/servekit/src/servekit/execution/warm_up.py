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


def step_sizes(max_tokens: int, max_model_len: int) -> Iterator[tuple[int, int, int]]:
    """``(rows, new tokens of each, context)``: prompts of each power of two of tokens, one token after each context."""
    for tokens in _doubled(2, max_tokens):
        rows = -(-tokens // max_model_len)
        yield rows, tokens // rows, tokens // rows
    for context in (1, *_doubled(2 * SHORTEST_SPLIT, max_model_len)):
        yield 1, 1, context


def _doubled(first: int, most: int) -> Iterator[int]:
    """``first`` and its doubles below ``most``, and ``most`` itself."""
    while first < most:
        yield first
        first *= 2
    yield most


def null_step(
    groups: list[KVGroup],
    size: tuple[int, int, int],
    block_size: int,
    build: MetadataBuilder,
    device: torch.device,
) -> StepInputs:
    """Rows of new tokens at the end of their contexts, all of them in the null block, which nobody reads.

    Args:
        size: as ``step_sizes`` has it.
    """
    num_rows, count, context = size
    counts, starts = np.full(num_rows, count), np.full(num_rows, context - count)
    tables = np.zeros((num_rows, -(-context // block_size)), np.int32)
    rows = [StepRows(tables, starts, counts, group.window) for group in groups]
    tokens = num_rows * count
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)  # of positions too: a step may be longer than a row
    return StepInputs(zeros, zeros, rows, block_size, build=build)
