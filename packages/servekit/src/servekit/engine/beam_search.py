"""Beam search over an engine: each round asks for one token of every beam and keeps the best continuations.

The beams of a prompt share its blocks, and each other's, through the prefix cache; where two part inside a block it is
copied. A finished beam is ranked by its logprob over ``length ** length_penalty``, its end token counted, as
Transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from common_platform.errors import RequestError
from servekit.core.plan import TokenLogprob
from servekit.sampling.parameters import MAX_LOGPROBS, SamplingParams

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2

NextTokens = Callable[[list[list[int]], SamplingParams], list[TokenLogprob | None]]


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a beam search may cost and how it ranks; the names are vLLM's.

    Raises:
        RequestError: a value is out of its range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0  # 0 ranks by the sum of logprobs, 1 by their mean

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise RequestError("beam_width", self.beam_width, f"1..{MAX_BEAM_WIDTH}", code="out_of_range")
        if self.max_tokens < 1:
            raise RequestError("max_tokens", self.max_tokens, "1 or more", code="out_of_range")


@dataclass(slots=True)
class Beam:
    """One continuation of a prompt."""

    token_ids: list[int]  # the prompt's tokens first
    num_prompt: int
    cum_logprob: float = 0.0
    finish_reason: str = "length"
    text: str = ""

    def extended(self, token: int, logprob: float) -> Beam:
        return Beam([*self.token_ids, token], self.num_prompt, self.cum_logprob + logprob)

    def score(self, length_penalty: float) -> float:
        return float(self.cum_logprob / max(len(self.token_ids) - self.num_prompt, 1) ** length_penalty)


@dataclass(slots=True)
class BeamSearchOutput:
    """The ``beam_width`` best continuations of one prompt, the best first."""

    sequences: list[Beam]


@dataclass(slots=True)
class _Search:
    """One prompt's beams."""

    running: list[Beam]
    ended: list[Beam] = field(default_factory=list)

    def advance(self, entries: Sequence[TokenLogprob | None], params: BeamSearchParams, ends: frozenset[int]) -> None:
        """Replace the beams by their best continuations; of the end tokens only those among the best count."""
        found = [
            (beam.extended(token, logprob), token in ends)
            for beam, entry in zip(self.running, entries, strict=True)
            for token, logprob in (entry.top if entry else ())
        ]
        found.sort(key=lambda pair: -pair[0].cum_logprob)
        self.running = []
        for rank, (beam, is_end) in enumerate(found):
            if not is_end:
                self.running.append(beam)
            elif rank < params.beam_width:
                beam.finish_reason = "stop"
                self.ended.append(beam)
            if len(self.running) == params.beam_width:
                break

    def best(self, params: BeamSearchParams) -> list[Beam]:
        ranked = sorted([*self.ended, *self.running], key=lambda beam: -beam.score(params.length_penalty))
        return ranked[: params.beam_width]


def beam_search(
    prompts: Sequence[list[int]], params: BeamSearchParams, eos_token_ids: Sequence[int], next_tokens: NextTokens
) -> list[list[Beam]]:
    """The best beams of each prompt.

    Args:
        next_tokens: one entry a sequence, with the ``2 * beam_width`` most likely next tokens; None where that
            sequence failed.
    """
    searches = [_Search([Beam(list(prompt), len(prompt))]) for prompt in prompts]
    ends = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    one = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=2 * params.beam_width, detokenize=False
    )
    for _ in range(params.max_tokens):
        active = [search for search in searches if search.running]
        if not active:
            break
        entries = iter(next_tokens([beam.token_ids for search in active for beam in search.running], one))
        for search in active:
            search.advance([next(entries) for _ in search.running], params, ends)
    return [search.best(params) for search in searches]
