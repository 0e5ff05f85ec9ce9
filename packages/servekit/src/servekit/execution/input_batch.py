"""The rows of the batch: persistent arrays that plans update in place. No loop over tokens anywhere."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from servekit.core.facts import KVGroup
from servekit.core.plan import BlockAppend, RowStart, StepPlan
from servekit.core.prompt_embeds import PromptEmbeds
from servekit.kernels.paged_attention.metadata import StepRows, build_metadata, to_device
from servekit.layers.attention import GivenRows, MetadataBuilder, StepInputs

UNKNOWN = -1  # a token that the device has sampled and the host has not seen yet


@dataclass(slots=True)
class StepArrays:
    """A step's rows: their slots, the position of the first new token, how many, and where each ends among all."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    lasts: np.ndarray  # index of each row's last token among the step's tokens


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of one token a row on a CPU: most often the next step has the same rows, one token further."""

    slots: list[int]
    step: StepArrays
    positions: torch.Tensor  # [rows], where ``step`` begins: its memory
    rows: list[StepRows]
    room: int  # tokens that the block tables in ``rows`` reach


class InputBatch:
    """Token ids, block tables and positions of up to ``max_num_seqs`` requests.

    Args:
        max_num_seqs: rows.
        max_model_len: tokens a row can hold.
        groups: one block table each.
        build: makes what the attention kernel reads.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        groups: list[KVGroup],
        device: torch.device,
        build: MetadataBuilder = build_metadata,
    ) -> None:
        self.build = build
        self._given: dict[int, tuple[int, torch.Tensor]] = {}  # slot -> first position, [tokens, hidden] from there
        self._decode: Decode | None = None  # the last step, unless block tables have changed since
        self._newest: torch.Tensor | None = None  # [max_num_seqs] int64, the token sampled last for each slot
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.groups = groups
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.tables = [np.zeros((max_num_seqs, max_blocks), np.int32) for _ in groups]
        self.table_lengths = [np.zeros(max_num_seqs, np.int64) for _ in groups]

    def start(self, row: RowStart) -> None:
        slot, count = row.slot, len(row.token_ids)
        self.token_ids[slot, :count] = row.token_ids
        self.num_tokens[slot] = count
        self.num_computed[slot] = row.num_computed_tokens
        self.num_prompt[slot] = row.num_prompt_tokens
        self.end(slot)
        if row.embeds is not None and row.num_computed_tokens < row.embeds.num_tokens:
            self._given[slot] = row.num_computed_tokens, _rows_of(row.embeds, row.num_computed_tokens, self.device)
        for group, blocks in enumerate(row.blocks):
            self.table_lengths[group][slot] = 0
            self._append(BlockAppend(slot, group, blocks))

    def end(self, slot: int) -> None:
        """The slot's row is over; most of it is written over by the next."""
        self._decode = None
        self._given.pop(slot, None)

    def append(self, appends: Sequence[BlockAppend]) -> None:
        """Block tables grow, mostly by one block each: those are written at once."""
        self._decode = None
        for group, (table, lengths) in enumerate(zip(self.tables, self.table_lengths, strict=True)):
            ones = [append for append in appends if append.group == group and len(append.blocks) == 1]
            if not ones:
                continue
            slots = _integers([append.slot for append in ones])
            table[slots, lengths[slots]] = [append.blocks[0] for append in ones]
            lengths[slots] += 1
        for append in appends:
            if len(append.blocks) != 1:
                self._append(append)

    def _append(self, append: BlockAppend) -> None:
        lengths = self.table_lengths[append.group]
        first = lengths[append.slot]
        last = first + len(append.blocks)
        self.tables[append.group][append.slot, first:last] = append.blocks
        lengths[append.slot] = last

    def extend(self, slot: int, token_ids: list[int]) -> None:
        """Tokens that exist now: sampled ones, or drafts to be verified."""
        first = self.num_tokens[slot]
        self.token_ids[slot, first : first + len(token_ids)] = token_ids
        self.num_tokens[slot] = first + len(token_ids)

    def add_sampled(self, slots: np.ndarray, token_ids: Sequence[int]) -> None:
        """One new token for each of ``slots``; all before it is computed."""
        ends = self.num_tokens[slots]
        self.token_ids[slots, ends] = _integers(token_ids)
        self.num_computed[slots] = ends
        self.num_tokens[slots] = ends + 1

    def replace_end(self, slot: int, num_drafts: int, token_ids: list[int]) -> None:
        """The row's drafts give way to what was sampled; all of it but the last token is computed."""
        self.num_tokens[slot] -= num_drafts
        self.extend(slot, token_ids)
        self.num_computed[slot] = self.num_tokens[slot] - 1

    def tokens_of(self, slot: int) -> np.ndarray:
        return self.token_ids[slot, : self.num_tokens[slot]]

    def arrays(self, plan: StepPlan) -> StepArrays:
        """The rows of ``plan``; valid until the next call."""
        if (last := self._decode) and plan.total_tokens == len(last.slots) and plan.slots == last.slots:
            self.num_computed.take(last.step.slots, out=last.step.starts)
            return last.step
        slots, num_rows = _integers(plan.slots), len(plan.slots)
        starts = self.num_computed[slots]
        if plan.total_tokens == num_rows:
            return StepArrays(slots, starts, np.ones(num_rows, np.int64), np.arange(num_rows))
        counts = _integers(plan.num_tokens)
        return StepArrays(slots, starts, counts, np.cumsum(counts) - 1)

    def inputs(self, step: StepArrays) -> StepInputs:
        """What the model reads for the tokens of ``step``."""
        is_known = self._newest is None  # every token, by the host
        if is_known and (last := self._decode) and step is last.step and step.starts.max() < last.room:
            ids = torch.from_numpy(self.token_ids[step.slots, step.starts])
            given = self._given_in(step) if self._given else None
            return StepInputs(ids, last.positions, last.rows, self.block_size, build=self.build, given=given)
        rows = self._rows(step)
        token_ids, positions = self._new_tokens(step)
        ids = to_device(token_ids, self.device)
        if self._newest is not None and (token_ids == UNKNOWN).any():
            slots = to_device(np.repeat(step.slots, step.counts), self.device)
            ids = torch.where(ids == UNKNOWN, self._newest[slots], ids)
        given = self._given_in(step) if self._given else None
        places = to_device(positions, self.device)
        return StepInputs(ids, places, rows, self.block_size, build=self.build, given=given)

    def _rows(self, step: StepArrays) -> list[StepRows]:
        """The block tables of the rows, as far as they reach."""
        longest = -(-int((step.starts + step.counts).max()) // self.block_size)
        rows = [
            StepRows(table[:, :longest].take(step.slots, axis=0), step.starts, step.counts, group.window)
            for group, table in zip(self.groups, self.tables, strict=True)
        ]
        self._decode = None
        if self.device.type == "cpu" and step.lasts[-1] + 1 == len(step.slots):
            places = torch.from_numpy(step.starts)
            self._decode = Decode(step.slots.tolist(), step, places, rows, longest * self.block_size)
        return rows

    def _given_in(self, step: StepArrays) -> GivenRows | None:
        """The given embeddings of the tokens of ``step``."""
        places: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for slot, start, count, last in zip(
            step.slots.tolist(), step.starts.tolist(), step.counts.tolist(), step.lasts.tolist(), strict=True
        ):
            if slot not in self._given:
                continue
            first, given = self._given[slot]
            mine = given[start - first : start - first + count]
            if len(mine):
                place = last + 1 - count
                places.append(torch.arange(place, place + len(mine), device=self.device))
                rows.append(mine)
            else:  # all of them are computed
                self.end(slot)
        return GivenRows(torch.cat(places), torch.cat(rows)) if places else None

    def add_unseen(self, slots: np.ndarray, token_ids: torch.Tensor) -> None:
        """As ``add_sampled``, with tokens ``[len(slots)]`` that stay on the device: nobody waits for them."""
        if self._newest is None:
            self._newest = torch.zeros(len(self.num_tokens), dtype=torch.int64, device=self.device)
        self._newest[to_device(slots.astype(np.int64), self.device)] = token_ids
        self.add_sampled(slots, [UNKNOWN] * len(slots))

    def _new_tokens(self, step: StepArrays) -> tuple[np.ndarray, np.ndarray]:
        """The ids and positions of the tokens of ``step``, row after row."""
        if step.lasts[-1] + 1 == len(step.slots):  # one each
            return self.token_ids[step.slots, step.starts], step.starts
        row_of = np.repeat(np.arange(len(step.slots)), step.counts)
        firsts = step.lasts + 1 - step.counts
        positions = np.arange(len(row_of)) - firsts[row_of] + step.starts[row_of]
        return self.token_ids[step.slots[row_of], positions], positions

    def following(self, step: StepArrays, row: int) -> np.ndarray:
        """The prompt tokens that stand after the tokens which ``row`` computes in ``step``."""
        slot, start, count = step.slots[row], step.starts[row], step.counts[row]
        return self.token_ids[slot, start + 1 : min(start + count + 1, self.num_prompt[slot])]


def _rows_of(embeds: PromptEmbeds, first: int, device: torch.device) -> torch.Tensor:
    """Those from ``first`` on, ``[num_tokens - first, hidden]`` float32, which holds all that narrower types can."""
    dtype: torch.dtype = getattr(torch, embeds.dtype)
    start = first * embeds.hidden_size * dtype.itemsize
    numbers = torch.frombuffer(bytearray(embeds.data[start:]), dtype=dtype)
    return numbers.view(-1, embeds.hidden_size).float().to(device)


def _integers(values: Sequence[int]) -> np.ndarray:
    """int64; sooner than numpy takes a list apart."""
    return np.frombuffer(array("q", values), np.int64)
