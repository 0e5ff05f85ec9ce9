"""All that serving launches, launched once before the first request: nobody waits for a kernel to be compiled.

A kernel is compiled anew for other constants, and some of those follow from a step's size: how high a tile of attention
is, into how many splits a context is cut, how the rows of a product with few bits are. These sizes meet all of them;
``tests/servekit/kernels/test_warm_up_on_triton.py`` holds the engine to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from servekit.core.facts import KVGroup
from servekit.kernels.paged_attention.metadata import StepRows
from servekit.layers.attention import MetadataBuilder, StepInputs

SHORTEST_SPLIT = 256  # tokens of a context, or more, for each split: one less would be no other kernel


def steps(max_tokens: int, max_model_len: int) -> Iterator[tuple[list[int], list[int]]]:
    """The rows' starts and counts of new tokens: prompts of each power of two of tokens, a token after each context."""
    for tokens in _doubled(2, max_tokens):
        longest = min(tokens, max_model_len)
        counts = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        yield [0] * len(counts), counts
    for context in (1, *_doubled(2 * SHORTEST_SPLIT, max_model_len)):
        yield [context - 1], [1]


def _doubled(first: int, most: int) -> Iterator[int]:
    """``first`` and its doubles below ``most``, and ``most`` itself."""
    while first < most:
        yield first
        first *= 2
    yield most


def null_step(
    groups: list[KVGroup],
    starts: Sequence[int],
    counts: Sequence[int],
    block_size: int,
    build: MetadataBuilder,
    device: torch.device,
) -> StepInputs:
    """Rows whose keys and values are in the null block, which nobody reads."""
    firsts, news = np.asarray(starts), np.asarray(counts)
    tables = np.zeros((len(news), -(-int((firsts + news).max()) // block_size)), np.int32)
    rows = [StepRows(tables, firsts, news, group.window) for group in groups]
    zeros = torch.zeros(int(news.sum()), dtype=torch.int64, device=device)  # of positions too: no angle is too far
    return StepInputs(zeros, zeros, rows, block_size, build=build)
