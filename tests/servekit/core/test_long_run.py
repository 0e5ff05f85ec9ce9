"""A hundred thousand operations on one scheduler after another, every invariant looked at after each of them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from tests.servekit.core.fake_runner import expected_output
from tests.servekit.core.test_scheduler import FULL, Harness

from servekit.core.facts import KVGroup
from servekit.core.plan import NULL_BLOCK
from servekit.core.request import RequestState

GROUPS = [FULL, [KVGroup(kind="sliding", window=12)], [KVGroup(), KVGroup(kind="sliding", window=9)], FULL]
OPERATIONS_OF_ONE = 1500


class Driver:
    """Random operations on one harness; ``check`` after each."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        groups = chance.choice(GROUPS)
        depth = chance.choice([1, 2])
        self.harness = Harness(
            depth=depth,
            groups=groups,
            num_blocks=chance.randint(12, 60),
            block_size=chance.choice([8, 16, 32, 64]),
            offload=chance.choice([0, 4, 30]),
            propose=chance.choice([0, 2]) if depth == 1 else 0,
            policy=chance.choice(["fcfs", "priority", "fair"]),
            max_num_seqs=chance.randint(1, 8),
            max_num_batched_tokens=chance.randint(1, 48),
            long_prefill_token_threshold=chance.choice([0, 0, 5]),
        )
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.done = 0

    def run(self, operations: int) -> int:
        actions = [self.add] * 3 + [self.step] * 12 + [self.abort, self.fork, self.hold, self.deadline, self.fail]
        for _ in range(operations):
            self.chance.choice([*actions, self.reset if self.chance.random() < 0.05 else self.step])()
            self.check()
            self.done += 1
        for name in list(self.harness.scheduler.requests):
            self.harness.scheduler.ready(name)
        self.harness.run(20_000)
        self.check_answers()
        return self.done

    def _prompt(self) -> list[int]:
        stem = [self.chance.randrange(3)] * self.chance.choice([0, 8, 17, 30])
        return stem + [self.chance.randrange(4) for _ in range(self.chance.randint(1, 25))]

    def _ask(self, prompt: list[int], count: int, **more: Any) -> str:
        name = f"r{len(self.asked)}"
        who = self.chance.randrange(3)
        self.harness.add(name, prompt, count, priority=who, tenant=f"t{who}", **more)
        self.asked[name] = (prompt, count)
        return name

    def add(self) -> None:
        if len(self.harness.scheduler.requests) < 40:
            salt = self.chance.choice(["", "", "other"])
            self._ask(self._prompt(), self.chance.randint(1, 40), cache_salt=salt)

    def fork(self) -> None:
        if len(self.harness.scheduler.requests) < 40:
            prompt, count = self._prompt(), self.chance.randint(1, 20)
            first = self._ask(prompt, count)
            for _ in range(self.chance.randint(1, 3)):
                self._ask(prompt, count, fork_of=first)

    def hold(self) -> None:
        held = [r.id for r in self.harness.scheduler.requests.values() if r.state is RequestState.WAITING_GRAMMAR]
        if held:
            self.harness.scheduler.ready(self.chance.choice(held))
        else:
            self._ask(self._prompt(), 5, held=RequestState.WAITING_GRAMMAR)

    def deadline(self) -> None:
        self._ask(self._prompt(), 30, deadline=self.harness.clock.now + self.chance.randint(0, 20))

    def fail(self) -> None:
        if self.asked:
            self.harness.runner.fail_slots[self.chance.choice(list(self.asked))] = "broken"

    def abort(self) -> None:
        if self.harness.scheduler.requests:
            self.harness.scheduler.abort(self.chance.choice(list(self.harness.scheduler.requests)))

    def reset(self) -> None:
        self.harness.scheduler.reset_prefix_cache()

    def step(self) -> None:
        self.harness.clock.now += 1
        self.harness.step()

    def check(self) -> None:
        """References are uses; free and held blocks are all blocks; slots are one request's each."""
        scheduler = self.harness.scheduler
        for index, pool in enumerate(scheduler.kv.pools):
            uses = Counter(block for r in scheduler.running for block in r.tables[index] if block != NULL_BLOCK)
            assert all(pool.references(block) == uses[block] for block in range(1, pool.num_blocks))
            assert pool.num_held == len(uses)
            assert len(pool.free_order()) == pool.num_free == pool.num_blocks - 1 - len(uses)
        slots = [request.slot for request in scheduler.running]
        assert sorted(slots + scheduler._free_slots) == list(range(self.harness.config.max_num_seqs))
        assert all(r.state is RequestState.RUNNING for r in scheduler.running)
        assert len(scheduler._policy) == sum(
            r.state in (RequestState.WAITING, RequestState.PREEMPTED) for r in scheduler.requests.values()
        )

    def check_answers(self) -> None:
        harness = self.harness
        harness.collect()
        assert sorted(harness.order) == sorted(self.asked), "each ends exactly once"
        for name, (prompt, count) in self.asked.items():
            tokens, reason = harness.tokens(name), harness.reason(name)
            assert tokens == expected_output(prompt, count)[: len(tokens)]
            assert reason in ("length", "abort", "timeout", "error")
            assert reason != "length" or len(tokens) == count


@pytest.mark.parametrize("seed", range(4))
def test_a_few_thousand_operations(seed):
    assert Driver(seed).run(400) == 400


@pytest.mark.slow
def test_a_hundred_thousand_operations():
    done = sum(Driver(1000 + seed).run(OPERATIONS_OF_ONE) for seed in range(70))
    assert done >= 100_000
