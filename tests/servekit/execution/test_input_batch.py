"""The rows of the batch: what a step reads is the same whatever steps came before it."""

from __future__ import annotations

import copy

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.core.facts import KVGroup
from servekit.core.plan import BlockAppend, RowStart, StepPlan
from servekit.execution.input_batch import InputBatch
from servekit.sampling.parameters import SamplingParams

BLOCK, ROWS, LENGTH = 4, 4, 64


class Blocks:
    """Gives each row the blocks that it needs, now and then one more than that."""

    def __init__(self, batch: InputBatch) -> None:
        self._batch = batch
        self._next = 1
        self._held: dict[int, int] = {}

    def new(self, count: int) -> list[int]:
        self._next += count
        return list(range(self._next - count, self._next))

    def start(self, slot: int, tokens: list[int]) -> None:
        self._held[slot] = -(-len(tokens) // BLOCK)
        blocks = self.new(self._held[slot])
        self._batch.start(RowStart(slot, str(slot), tokens, len(tokens), 0, [blocks], SamplingParams(), []))

    def grow(self, slots: list[int], *, early: bool) -> None:
        appends = []
        for slot in slots:
            wanted = int(self._batch.num_computed[slot]) // BLOCK + 1 + early
            if wanted > self._held[slot]:
                appends.append(BlockAppend(slot, 0, self.new(wanted - self._held[slot])))
                self._held[slot] = wanted
        if appends:
            self._batch.append(appends)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_decode_reads_what_it_would_read_if_nothing_were_kept_of_the_last_one(data):
    batch = InputBatch(ROWS, LENGTH, BLOCK, [KVGroup(layers=[0])], torch.device("cpu"))
    blocks, running = Blocks(batch), []
    for number in range(data.draw(st.integers(1, 30))):
        free = [slot for slot in range(ROWS) if slot not in running]
        if free and (not running or data.draw(st.integers(0, 5)) == 0):
            slot = data.draw(st.sampled_from(free))
            blocks.start(slot, data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=9)))
            running.append(slot)
            slots, counts = [slot], [int(batch.num_tokens[slot])]
        else:
            slots = data.draw(st.sampled_from([running, running, running, running[:1]]))
            counts = [1] * len(slots)
            blocks.grow(slots, early=data.draw(st.booleans()))
        plan = StepPlan(number, list(slots), counts, [True] * len(slots))
        alone = copy.deepcopy(batch)
        alone.append([])  # nothing is kept over a change of block tables
        step, expected_step = batch.arrays(plan), alone.arrays(plan)
        found, expected = batch.inputs(step), alone.inputs(expected_step)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.positions.tolist() == expected.positions.tolist()
        for mine, its in zip(found.rows, expected.rows, strict=True):
            np.testing.assert_array_equal(mine.starts, its.starts)
            np.testing.assert_array_equal(mine.counts, its.counts)
            for row, end in enumerate(its.starts + its.counts):
                needed = -(-int(end) // BLOCK)
                np.testing.assert_array_equal(mine.tables[row, :needed], its.tables[row, :needed])
        batch.add_sampled(step.slots, data.draw(st.lists(st.integers(1, 99), min_size=len(slots), max_size=len(slots))))
        running = [slot for slot in running if batch.num_tokens[slot] < LENGTH - 1]
