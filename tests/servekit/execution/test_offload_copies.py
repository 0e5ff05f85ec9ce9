"""The offload tier's copies: what comes back is what left, and a stream beside the computation is waited for."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.execution.offload import OffloadStore
from servekit.layers.attention import Attention

BLOCKS, SLOTS = 6, 4


def make_attentions(dtype=torch.float32):
    attentions = [Attention(2, 1, 4, scale=1.0) for _ in range(2)]
    for attention in attentions:
        attention.bind(BLOCKS, 2, dtype, torch.device("cpu"))
    return attentions


def fill(attentions, block, number):
    for layer, attention in enumerate(attentions):
        for part, cache in enumerate(attention.caches):
            for half in range(2):
                cache[half, block] = number + 10 * layer + half + part


def found(attentions, block):
    return [[cache[half, block].unique().tolist() for cache in a.caches for half in range(2)] for a in attentions]


pairs = st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, SLOTS - 1))
moves = st.lists(
    st.tuples(
        st.lists(pairs, max_size=3, unique_by=(lambda p: p[0], lambda p: p[1])),
        st.lists(pairs, max_size=3, unique_by=(lambda p: p[0], lambda p: p[1])),
    ),
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(moves)
def test_blocks_come_back_as_they_left_and_those_that_leave_go_first(steps):
    """Beside a model of it: blocks and slots are numbers."""
    attentions = make_attentions(torch.int8)
    store = OffloadStore(attentions, SLOTS, None)
    blocks, slots = [0] * BLOCKS, [None] * SLOTS
    for block in range(BLOCKS):
        blocks[block] = block + 1
        fill(attentions, block, blocks[block])
    for saves, wanted in steps:
        filled = {slot for slot, number in enumerate(slots) if number is not None} | {slot for _, slot in saves}
        loads = [(slot, block) for block, slot in wanted if slot in filled]
        store.move(saves, loads)
        left = [(slot, blocks[block]) for block, slot in saves]
        for slot, number in left:
            slots[slot] = number
        arrived = [(block, slots[slot]) for slot, block in loads]
        for block, number in arrived:
            blocks[block] = number
        expected = make_attentions(torch.int8)
        for block, number in enumerate(blocks):
            fill(expected, block, number)
            assert found(attentions, block) == found(expected, block)


class Recorded:
    """A stream that says in which order it was asked."""

    def __init__(self):
        self.told = []

    @contextmanager
    def copies(self):
        self.told.append("copies begin")
        yield
        self.told.append("copies end")

    def after_compute(self):
        self.told.append("copies wait for compute")

    def before_compute(self):
        self.told.append("compute waits for copies")

    def keep(self, tensor):
        self.told.append("kept")


def test_a_step_waits_for_what_it_reads_and_not_for_what_leaves():
    stream = Recorded()
    store = OffloadStore(make_attentions(), SLOTS, None, stream)
    store.move([(1, 0)], [])
    out = ["copies wait for compute", "copies begin", "kept", "kept", "copies end"]
    assert stream.told == out
    stream.told.clear()
    store.move([(1, 0)], [(0, 2)])
    assert stream.told == [*out, *out, "compute waits for copies"]
    stream.told.clear()
    store.move([], [])
    assert stream.told == []
