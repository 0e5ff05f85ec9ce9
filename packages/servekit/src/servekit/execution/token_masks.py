"""Which tokens a request may have next, as bits: token t is bit t % 32 of word t // 32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]  # [ceil(vocab / 32)]


def no_token(vocab_size: int) -> Words:
    return np.zeros((vocab_size + 31) // 32, np.int32)


def every_token(vocab_size: int) -> Words:
    words = np.full((vocab_size + 31) // 32, -1, np.int32)
    if vocab_size % 32:
        words[-1] = (1 << vocab_size % 32) - 1
    return words


def these(token_ids: Sequence[int], vocab_size: int) -> Words:
    words = no_token(vocab_size)
    np.bitwise_or.at(words.view(np.uint32), *_bits(token_ids))
    return words


def without(words: Words, token_ids: Iterable[int]) -> Words:
    """A copy that lacks ``token_ids``."""
    words = words.copy()
    places, bits = _bits(token_ids)
    np.bitwise_and.at(words.view(np.uint32), places, ~bits)
    return words


def _bits(token_ids: Iterable[int]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    ids = np.asarray(list(token_ids), np.int64)
    return ids >> 5, np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32))
