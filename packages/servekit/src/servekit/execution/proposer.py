"""Drafts for speculative decoding: tokens that a row will probably say next, to be verified in one step.

A draft is verified by sampling: at each position the target's own token is drawn as it would have been without the
draft, and the draft is kept as long as it is that token. So the output is the same, token for token, seed for seed,
and a draft is accepted as often as rejection sampling would accept it (Leviathan et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from servekit.core.config import CacheConfig
from servekit.execution.input_batch import InputBatch
from servekit.execution.speculative import SpeculativeConfig
from servekit.layers.attention import Attention, StepInputs
from servekit.models.registry import CausalModel


class Proposer(Protocol):
    """Makes drafts; it sees everything that the target computes, in the same order."""

    attentions: list[Attention]  # whose keys and values it keeps
    models: list[CausalModel]  # that it runs

    def bind(self, cache: CacheConfig, max_num_seqs: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate what it keeps, once the blocks are counted."""

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Blocks were copied: (group, from, to)."""

    def computed(self, inputs: StepInputs) -> None:
        """The target has computed the tokens of ``inputs``."""

    def propose(self, batch: InputBatch, slots: Sequence[int]) -> list[list[int]]:
        """What may follow the tokens of each slot, whose last one is not computed yet; empty without a good guess."""


class NgramProposer:
    """What followed when the row said its last few tokens before (Saxena, "Prompt Lookup Decoding", 2023).

    The latest such place that is followed by a whole draft counts, else the earliest, which is followed by most.
    Cost: one pass over the row's tokens for each length that is tried.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self.attentions: list[Attention] = []
        self.models: list[CausalModel] = []

    def bind(self, cache: CacheConfig, max_num_seqs: int, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing is kept."""

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Nothing is kept in blocks."""

    def computed(self, inputs: StepInputs) -> None:
        """Nothing is kept of it."""

    def propose(self, batch: InputBatch, slots: Sequence[int]) -> list[list[int]]:
        return [self.following(batch.tokens_of(slot)) for slot in slots]

    def following(self, token_ids: NDArray[np.int64]) -> list[int]:
        """What may follow ``token_ids``."""
        config = self._config
        for length in range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1):
            if len(token_ids) <= length:
                continue
            windows = sliding_window_view(token_ids[:-1], length)
            found = np.flatnonzero((windows == token_ids[-length:]).all(axis=1))
            if len(found):
                count = config.num_speculative_tokens
                whole = found[found + length + count <= len(token_ids)]
                first = int(whole[-1] if len(whole) else found[0]) + length
                return token_ids[first : first + count].tolist()
        return []
