"""Drafts for speculative decoding: tokens that a row will probably say next, to be verified in one step.

A draft is verified by sampling: at each position the target's own token is drawn as it would have been without the
draft, and the draft is kept as long as it is that token. So the output is the same, token for token, seed for seed,
and a draft is accepted as often as rejection sampling would accept it (Leviathan et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from common_platform.errors import ConfigError
from servekit.core.config import CacheConfig
from servekit.execution.input_batch import InputBatch
from servekit.layers.attention import Attention, StepInputs

METHODS = ("ngram", "draft_model")


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How drafts are made; the names are vLLM's."""

    method: str = ""  # ngram | draft_model; unset: draft_model where a model is named
    model: str | None = None  # the draft model's folder; its vocabulary is the target's
    num_speculative_tokens: int = 4  # drafts of a row in one step
    prompt_lookup_max: int = 4  # ngram: longest run of tokens that is looked up
    prompt_lookup_min: int = 2  # ngram: shortest

    def __post_init__(self) -> None:
        if self.method not in ("", *METHODS):
            raise ConfigError("speculative_config.method", self.method, f"one of {METHODS}")
        if (self.method == "draft_model") > (self.model is not None):
            raise ConfigError("speculative_config.model", None, "a model folder for method draft_model")
        if self.method == "ngram" and self.model is not None:
            raise ConfigError("speculative_config.model", self.model, "none for method ngram")
        if not 1 <= self.num_speculative_tokens <= 32:
            name = "speculative_config.num_speculative_tokens"
            raise ConfigError(name, self.num_speculative_tokens, "1..32", flag="--num-speculative-tokens")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= 32:
            name, limit = "speculative_config.prompt_lookup_min", f"1..prompt_lookup_max={self.prompt_lookup_max}"
            raise ConfigError(name, self.prompt_lookup_min, limit)

    @classmethod
    def parse(cls, text: str) -> SpeculativeConfig:
        """Read JSON.

        Raises:
            ConfigError: it is no object of these fields.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.ValidationError as error:
            raise error.__cause__ if isinstance(error.__cause__, ConfigError) else _not_json(text, error) from None
        except msgspec.DecodeError as error:
            raise _not_json(text, error) from None


def _not_json(text: str, error: Exception) -> ConfigError:
    return ConfigError(
        "speculative_config", text, f"a JSON object of its fields ({error})", flag="--speculative-config"
    )


class Proposer(Protocol):
    """Makes drafts; it sees everything that the target computes, in the same order."""

    attentions: list[Attention]  # whose keys and values it keeps

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
