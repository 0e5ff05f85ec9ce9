"""What the sampler remembers of one request: parameters, what it said, and what its own rules allow next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from servekit.execution.logits_processors import LogitsProcessor
from servekit.execution.token_masks import Words, every_token, no_token, these, without
from servekit.sampling.parameters import SamplingParams


class Grammar(Protocol):
    """What a structured output allows next: ``servekit.sampling.structured.matcher.GrammarState``."""

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Set bit i of word j of ``row`` ``[ceil(vocab / 32)]`` where token 32 * j + i is allowed."""

    def accept(self, tokens: Sequence[int]) -> bool:
        """Move on by ``tokens``; False where one is not allowed."""

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where there is a choice."""


@dataclass(slots=True)
class SamplerRow:
    """One request's."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: list[int]
    banned_early: list[int]  # until min_tokens are out
    grammar: Grammar | None
    processors: list[LogitsProcessor]
    allowed: Words | None = None  # by allowed_token_ids and bad words of one token; None for all
    bad_words: list[list[int]] = field(default_factory=list)  # of several tokens
    penalties: int | None = None  # its row of the penalty table
    failure: str = ""  # why no token can be sampled for it

    @property
    def is_special(self) -> bool:
        """Whether anything but the most likely token is ever asked for, or what came before matters."""
        p = self.params
        return bool(self.is_edited or p.logit_bias or p.logprobs is not None or not p.is_greedy) or self.is_penalised

    @property
    def is_looked_at(self) -> bool:
        """Whether the host ever has to look at it before or after a token."""
        p = self.params
        asked = p.min_tokens > 0 or p.logprobs is not None or p.typical_p < 1
        return bool(asked or self.is_edited)

    @property
    def is_adjusted(self) -> bool:
        """Whether its logits are changed by numbers that do not depend on what the host has seen."""
        return bool(self.params.logit_bias) or self.is_penalised

    @property
    def is_penalised(self) -> bool:
        return self.penalties is not None

    @property
    def is_masked(self) -> bool:
        is_short = len(self.output_ids) < self.params.min_tokens
        return bool(self.grammar or self.bad_words or is_short) or self.allowed is not None

    @property
    def is_edited(self) -> bool:
        """Whether the host has to look at it before each token."""
        return bool(self.is_masked or self.processors or self.failure)

    def next_mask(self, vocab_size: int) -> Words:
        """The tokens that its own rules allow next. A grammar that is finished may end it before ``min_tokens``."""
        mask = every_token(vocab_size) if self.allowed is None else self.allowed
        output = self.output_ids
        mask = without(mask, (word[-1] for word in self.bad_words if output[1 - len(word) :] == word[:-1]))
        if self.grammar:
            by_grammar = no_token(vocab_size)
            self.grammar.fill_mask(by_grammar)
            mask &= by_grammar
        if len(output) < self.params.min_tokens:
            going_on = without(mask, self.banned_early)
            return mask if self.grammar and not going_on.any() else going_on
        return mask


def add_masks(row: SamplerRow, vocab_size: int) -> None:
    """What of the parameters' masks is the same before each token."""
    words = row.params.bad_words_token_ids or ()
    never = [word[0] for word in words if len(word) == 1]
    row.bad_words = [list(word) for word in words if len(word) > 1]
    if row.params.allowed_token_ids or never:
        given = row.params.allowed_token_ids
        row.allowed = without(these(given, vocab_size) if given else every_token(vocab_size), never)
