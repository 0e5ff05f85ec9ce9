"""Blocks: every one is free or held, cached ones are given out last and by age, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.core.block_pool import BlockPool, OutOfBlocks
from servekit.core.plan import NULL_BLOCK

NUM_BLOCKS = 9
moves = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 5)),
        st.tuples(st.just("touch"), st.integers(1, NUM_BLOCKS - 1)),
        st.tuples(st.just("release"), st.integers(1, NUM_BLOCKS - 1)),
        st.tuples(st.just("cache"), st.integers(1, NUM_BLOCKS - 1)),
        st.tuples(st.just("forget"), st.integers(1, NUM_BLOCKS - 1)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(moves)
def test_the_pool_does_what_a_plain_model_of_it_does(moves):
    evicted: list[int] = []
    pool = BlockPool(NUM_BLOCKS, on_evict=evicted.append)
    held = dict.fromkeys(range(1, NUM_BLOCKS), 0)
    cached: set[int] = set()
    for action, number in moves:
        free = [block for block in held if not held[block]]
        match action:
            case "take" if number > len(free):
                with pytest.raises(OutOfBlocks):
                    pool.allocate(number)
            case "take":
                order = pool.free_order()
                taken = pool.allocate(number)
                assert taken == order[:number]
                assert all(held[block] == 0 for block in taken)
                assert {b for b in taken if b in cached} <= set(evicted)
                cached -= set(taken)
                held |= dict.fromkeys(taken, 1)
            case "touch" if held[number] or number in cached:
                pool.touch(number)
                held[number] += 1
            case "release" if held[number]:
                pool.release([number])
                held[number] -= 1
                if not held[number]:
                    assert pool.free_order()[-1 if number in cached else 0] == number
            case "release":
                with pytest.raises(RuntimeError, match="more often"):
                    pool.release([number])
            case "cache" if held[number]:
                pool.mark_cached(number)
                cached.add(number)
            case "forget":
                pool.forget(number)
                cached.discard(number)
        assert sorted(pool.free_order()) == [block for block in held if not held[block]]
        assert pool.num_free + pool.num_held == NUM_BLOCKS - 1
        assert all(pool.references(block) == count for block, count in held.items())


def test_the_null_block_is_nobodys():
    pool = BlockPool(4)
    assert NULL_BLOCK not in pool.allocate(3)
    pool.touch(NULL_BLOCK)
    pool.release([NULL_BLOCK])
    assert pool.num_free == 0
