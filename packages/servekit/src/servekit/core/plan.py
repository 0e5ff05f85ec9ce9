"""The only data that crosses from the scheduler to the execution side, and back.

Plain integers and lists: a plan can be printed, stored as JSON or msgpack, and replayed. The execution
side keeps the state of each row (tokens, block table, position) and a plan carries what changes.

The order in which a plan is applied: ``ends``, ``saves``, ``loads``, ``copies``, ``starts``, ``appends``, then
``slots`` are computed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from servekit.core.prompt_embeds import PromptEmbeds
from servekit.sampling.parameters import SamplingParams

NULL_BLOCK = 0  # block 0 is never given out: it pads tables and stands where a window has moved on


class RowStart(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot: everything the execution side must know of it."""

    slot: int  # 0..max_num_seqs-1, the row of the input batch
    request_id: str
    token_ids: list[int]  # prompt, then what was generated before a preemption
    num_prompt_tokens: int
    num_computed_tokens: int  # tokens whose keys and values are in the blocks already
    blocks: list[list[int]]  # one block table a KV group
    sampling: SamplingParams
    eos_token_ids: list[int]  # banned until min_tokens are out
    adapter_id: int = 0  # 0: no adapter
    pooling: str = ""  # last | mean | all
    embeds: PromptEmbeds | None = None  # in place of those of the prompt's tokens


class BlockAppend(msgspec.Struct, frozen=True, array_like=True):
    """A row's block table of one KV group grows."""

    slot: int
    group: int
    blocks: list[int]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step's work.

    ``slots[i]`` computes ``num_tokens[i]`` tokens from its first uncomputed one, and a token is sampled for it
    if ``samples[i]``. ``drafts[slot]`` are speculative tokens, counted in ``num_tokens``, to be verified.
    """

    step: int
    slots: list[int]
    num_tokens: list[int]
    samples: list[bool]
    starts: list[RowStart] = []
    ends: list[int] = []  # slots given back since the last plan
    appends: list[BlockAppend] = []
    copies: list[tuple[int, int, int]] = []  # (group, from, to): copy-on-write of whole blocks
    drafts: dict[int, list[int]] = {}
    saves: list[tuple[int, int]] = []  # (block, slot of the offload tier), of group 0
    loads: list[tuple[int, int]] = []  # (slot of the offload tier, block)

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One position's logprobs: the token that stands there, its rank from 1, and the most likely ones."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step computed.

    ``tokens`` has one entry for each slot with ``samples`` true, in the plan's order; more than one token where
    drafts were accepted, none where the row is in ``errors``. Where each of them has just one token and nothing else is
    told, ``sampled`` has it and ``tokens`` is empty.
    """

    step: int
    tokens: list[list[int]]
    logprobs: dict[int, list[TokenLogprob]] = {}  # slot -> one for each sampled token
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}  # slot -> prompt positions computed in this step, from 1 on
    errors: dict[int, str] = {}  # slot -> why this row alone failed
    proposals: dict[int, list[int]] = {}  # slot -> drafts for its next step
    sampled: list[int] = []
    pooled: dict[int, list[Any]] = {}  # slot -> a vector, or one a token, with the last token of its prompt
