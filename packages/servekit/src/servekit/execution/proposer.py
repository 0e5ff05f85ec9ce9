"""Drafts for speculative decoding: tokens that a row will probably say next, to be verified in one step.

A draft is verified by sampling: at each position the target's own token is drawn as it would have been without the
draft, and the draft is kept as long as it is that token. So the output is the same, token for token, seed for seed,
and a draft is accepted as often as rejection sampling would accept it (Leviathan et al., ICML 2023).
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from common_platform.errors import ConfigError


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How drafts are made; the names are vLLM's."""

    method: str = "ngram"  # prompt lookup: no second model
    num_speculative_tokens: int = 4  # drafts of a row in one step
    prompt_lookup_max: int = 4  # longest run of tokens that is looked up
    prompt_lookup_min: int = 2  # shortest

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise ConfigError("speculative_config.method", self.method, "ngram")
        if not 1 <= self.num_speculative_tokens <= 32:
            name = "speculative_config.num_speculative_tokens"
            raise ConfigError(name, self.num_speculative_tokens, "1..32", flag="--num-speculative-tokens")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= 32:
            name, limit = "speculative_config.prompt_lookup_min", f"1..prompt_lookup_max={self.prompt_lookup_max}"
            raise ConfigError(name, self.prompt_lookup_min, limit)


class Proposer(Protocol):
    """Makes drafts for one row."""

    def propose(self, token_ids: NDArray[np.int64]) -> list[int]:
        """What may follow ``token_ids``; empty where there is no good guess."""


class NgramProposer:
    """What followed when the row said its last few tokens before (Saxena, "Prompt Lookup Decoding", 2023).

    The latest such place that is followed by a whole draft counts, else the earliest, which is followed by most.
    Cost: one pass over the row's tokens for each length that is tried.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config

    def propose(self, token_ids: NDArray[np.int64]) -> list[int]:
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
