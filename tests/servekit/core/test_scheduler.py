"""The scheduler as a whole, driven against an execution side that checks every block it reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.servekit.core.fake_runner import FakeRunner, expected_output, next_token

from common_platform.errors import ConfigError, RequestError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup
from servekit.core.request import DecodedTokens, FinishReason, Request, RequestState, RequestUpdate, Update
from servekit.core.scheduler import Scheduler
from servekit.sampling.parameters import SamplingParams

FULL = [KVGroup()]


def told_apart(updates: list[Update]) -> Iterator[RequestUpdate]:
    """The same news, request by request."""
    for update in updates:
        if isinstance(update, DecodedTokens):
            for request_id, token in zip(update.request_ids, update.token_ids, strict=True):
                yield RequestUpdate(request_id, [token])
        else:
            yield update


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Harness:
    """A scheduler, a runner, and ``depth`` steps under way at a time."""

    def __init__(
        self, *, depth: int = 1, groups=FULL, num_blocks=64, block_size=8, propose=0, cache=True, offload=0, **config
    ):
        self.clock = Clock()
        self.cache = CacheConfig(
            num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=cache, num_offload_blocks=offload
        )
        defaults: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 256}
        self.config = SchedulerConfig(**(defaults | config))
        self.scheduler = Scheduler(self.config, self.cache, groups, clock=self.clock)
        self.runner = FakeRunner(block_size, groups, propose)
        self.depth = depth
        self.pending: deque[Any] = deque()
        self.updates: dict[str, list[RequestUpdate]] = {}
        self.order: list[str] = []

    def add(self, name: str, prompt: list[int], max_tokens: int | None = 4, **more: Any) -> Request:
        keys = ("priority", "tenant", "deadline", "adapter_id", "cache_salt", "held", "fork_of", "eos_token_ids")
        about = {key: more.pop(key) for key in keys if key in more}
        request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, **more), clock=self.clock, **about)
        self.scheduler.add(request)
        return request

    def step(self) -> int:
        """Plan one step, end the oldest where ``depth`` are under way; the tokens planned."""
        plan = self.scheduler.plan_step()
        assert plan.total_tokens <= self.config.max_num_batched_tokens
        assert len(plan.slots) <= self.config.max_num_seqs
        self.pending.append((plan, self.runner.execute(plan)))
        while len(self.pending) >= self.depth or (self.pending and not plan.slots):
            self.scheduler.finish_step(*self.pending.popleft())
        self.collect()
        return plan.total_tokens

    def collect(self) -> None:
        for update in told_apart(self.scheduler.take_updates()):
            self.updates.setdefault(update.request_id, []).append(update)
            if update.finish_reason:
                self.order.append(update.request_id)

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        else:
            raise AssertionError(f"still at work after {limit} steps: {self.scheduler.stats()}")
        self.step()  # the last slots are given back
        self.assert_nothing_is_held()

    def assert_nothing_is_held(self) -> None:
        assert all(pool.num_held == 0 for pool in self.scheduler.kv.pools)
        assert not self.scheduler.running
        assert not self.runner.rows
        assert sorted(self.scheduler._free_slots) == list(range(self.config.max_num_seqs))
        assert not self.scheduler._forks
        assert not self.scheduler._under_way

    def tokens(self, name: str) -> list[int]:
        return [token for update in self.updates.get(name, []) for token in update.token_ids]

    def reason(self, name: str) -> str | None:
        return self.updates[name][-1].finish_reason


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=40)  # few symbols: many shared prefixes
groups = st.sampled_from(
    [
        FULL,
        [KVGroup(kind="sliding", window=12)],
        [KVGroup(), KVGroup(kind="sliding", window=9)],
        [KVGroup(), KVGroup(kind="linear")],
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=12),
    groups=groups,
    depth=st.integers(1, 2),
    num_blocks=st.integers(12, 40),
    budget=st.integers(1, 64),
    threshold=st.integers(0, 9),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    cache=st.booleans(),
    propose=st.integers(0, 3),
    max_num_seqs=st.integers(1, 6),
    offload=st.sampled_from([0, 2, 40]),
)
def test_every_request_gets_the_tokens_it_would_get_alone(
    requests, groups, depth, num_blocks, budget, threshold, policy, cache, propose, max_num_seqs, offload
):
    harness = Harness(
        offload=offload,
        depth=depth,
        groups=groups,
        num_blocks=num_blocks,
        cache=cache,
        propose=propose if depth == 1 and all(g.kind != "linear" for g in groups) else 0,
        max_num_batched_tokens=budget,
        long_prefill_token_threshold=threshold,
        policy=policy,
        max_num_seqs=max_num_seqs,
    )
    for i, (prompt, max_tokens, who) in enumerate(requests):
        harness.add(f"r{i}", prompt, max_tokens, priority=who, tenant=f"t{who}", cache_salt=f"{who % 2}")
        if who:
            harness.step()
    harness.run()
    for i, (prompt, max_tokens, _) in enumerate(requests):
        assert harness.tokens(f"r{i}") == expected_output(prompt, max_tokens)
        assert harness.reason(f"r{i}") == "length"


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), prompts, st.integers(0, 20)),
        st.tuples(st.just("fork"), prompts, st.integers(1, 12)),
        st.tuples(st.just("held"), prompts, st.integers(1, 6)),
        st.tuples(st.just("deadline"), prompts, st.integers(1, 30)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("ready"), st.integers(0, 30)),
        st.tuples(st.just("fail"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("reset")),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(actions=actions, depth=st.integers(1, 2), num_blocks=st.integers(11, 24))
def test_whatever_happens_all_that_was_taken_comes_back(actions, depth, num_blocks):
    harness = Harness(
        depth=depth, num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=16, offload=num_blocks % 3 * 5
    )
    added: list[tuple[str, list[int], int]] = []

    def add(prompt: list[int], count: int, **more: Any) -> None:
        added.append((f"r{len(added)}", prompt, count))
        harness.add(f"r{len(added) - 1}", prompt, count, **more)

    for action in actions:
        match action:
            case ("add", prompt, count):
                add(prompt, count)
            case ("fork", prompt, count):
                first = f"r{len(added)}"
                add(prompt, count)
                add(prompt, count, fork_of=first)
                add(prompt, count, fork_of=first)
            case ("held", prompt, count):
                add(prompt, count, held=RequestState.WAITING_GRAMMAR)
            case ("deadline", prompt, count):
                add(prompt, count, deadline=harness.clock.now + 3)
            case ("abort", which):
                harness.scheduler.abort(f"r{which}")
            case ("ready", which):
                harness.scheduler.ready(f"r{which}")
            case ("fail", which):
                harness.runner.fail_slots[f"r{which}"] = "broken"
            case ("step", count):
                for _ in range(count):
                    harness.clock.now += 1
                    harness.step()
            case ("reset",):
                harness.scheduler.reset_prefix_cache()
    for name, _, _ in added:
        harness.scheduler.ready(name)
    harness.run()
    harness.collect()
    assert sorted(harness.order) == sorted(name for name, _, _ in added), "each ends exactly once"
    for name, prompt, count in added:
        tokens, reason = harness.tokens(name), harness.reason(name)
        assert tokens == expected_output(prompt, count)[: len(tokens)]
        assert reason in ("length", "abort", "timeout", "error")
        assert reason != "length" or len(tokens) == count


def test_a_prefix_that_was_evicted_comes_back_from_the_offload_tier():
    harness = Harness(num_blocks=7, offload=20)
    prompts = [[k] * 40 for k in range(3)]  # five blocks of eight each: the pool holds one request at a time
    for turn in range(2):
        for k, prompt in enumerate(prompts):
            harness.add(f"{turn}{k}", prompt, 1)
            harness.run()
            assert harness.tokens(f"{turn}{k}") == expected_output(prompt, 1)
    stats = harness.scheduler.stats()
    assert stats.offload_hit_tokens == 3 * 32
    assert harness.runner.tokens_computed == 3 * 40 + 3 * 8
    harness.scheduler.reset_prefix_cache()
    harness.add("anew", prompts[0], 1)
    harness.run()
    assert harness.scheduler.stats().offload_hit_tokens == stats.offload_hit_tokens


def test_a_prefix_hit_saves_the_tokens_and_is_reported():
    harness = Harness()
    prompt = list(range(20))
    harness.add("first", prompt)
    harness.run()
    before = harness.runner.tokens_computed
    harness.add("second", [*prompt, 21, 22])
    harness.run()
    assert harness.updates["second"][0].num_cached_tokens == 20  # two whole blocks and 4 tokens of the third
    assert harness.runner.tokens_computed - before == 2 + 3
    assert harness.scheduler.stats().prefix_hit_tokens == 20


@pytest.mark.parametrize("difference", [{"cache_salt": "other"}, {"adapter_id": 1}])
def test_a_hit_never_crosses_salts_or_adapters(difference):
    harness = Harness()
    prompt = list(range(24))
    harness.add("first", prompt)
    harness.run()
    harness.add("second", prompt, **difference)
    harness.run()
    assert harness.updates["second"][0].num_cached_tokens == 0


def test_after_a_reset_nothing_is_found_not_even_what_running_requests_go_on_to_compute():
    harness = Harness()
    prompt = list(range(24))
    harness.add("first", prompt, 12)
    for _ in range(4):
        harness.step()
    assert harness.scheduler.reset_prefix_cache()
    harness.run()
    harness.add("second", prompt)
    harness.run()
    assert harness.updates["second"][0].num_cached_tokens == 0


def test_forks_share_the_prompt_and_compute_it_once():
    harness = Harness()
    prompt = [i % 7 for i in range(30)]
    harness.add("a", prompt, 5)
    for name in "bcd":
        harness.add(name, prompt, 5, fork_of="a")
    harness.run()
    assert harness.runner.tokens_computed == 30 + 3 * 1 + 4 * 4
    assert {tuple(harness.tokens(name)) for name in "abcd"} == {tuple(expected_output(prompt, 5))}


def test_prefill_is_chunked_and_decodes_go_on_beside_it():
    harness = Harness(max_num_batched_tokens=16)
    harness.add("short", [1, 2], 20)
    harness.step()
    harness.add("long", [3] * 100, 2)
    before = len(harness.tokens("short"))
    steps = 0
    while not harness.tokens("long"):
        harness.step()
        steps += 1
    assert steps == 7  # 100 tokens at 15 a step
    assert len(harness.tokens("short")) - before == steps


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=10),
    depth=st.integers(1, 2),
    num_blocks=st.integers(12, 40),
)
def test_without_chunks_a_prompt_is_computed_in_one_step(requests, depth, num_blocks):
    config = {"max_num_batched_tokens": 64, "max_model_len": 64, "enable_chunked_prefill": False}
    harness = Harness(depth=depth, num_blocks=num_blocks, **config)
    for i, (length, max_tokens) in enumerate(requests):
        harness.add(f"r{i}", [i] * length, max_tokens)
    while harness.scheduler.has_work:
        harness.step()
        assert all(request.num_computed >= request.num_prompt for request in harness.scheduler.running)
    harness.run()
    for i, (length, max_tokens) in enumerate(requests):
        assert harness.tokens(f"r{i}") == expected_output([i] * length, max_tokens)


def test_prompts_that_could_never_be_computed_whole_are_no_setting():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens.*63.*max_model_len=64"):
        SchedulerConfig(max_num_batched_tokens=63, max_model_len=64, enable_chunked_prefill=False)
    with pytest.raises(ConfigError, match="long_prefill_token_threshold"):
        SchedulerConfig(enable_chunked_prefill=False, long_prefill_token_threshold=8)


def test_preemption_takes_the_last_one_admitted_and_loses_no_token():
    harness = Harness(num_blocks=7, max_model_len=48)
    harness.add("old", [1] * 15, 30)
    harness.add("young", [2] * 15, 30)
    harness.run()
    assert harness.scheduler.stats().preemptions >= 1
    assert harness.order == ["old", "young"]
    names = names_of_events(harness, "young")
    assert names.count("preempted") == names.count("resumed") >= 1
    assert names[names.index("preempted") + 1] == "resumed"
    assert harness.tokens("young") == expected_output([2] * 15, 30)


def names_of_events(harness: Harness, name: str) -> list[str]:
    """In the order in which they came, which is that of their times."""
    events = [event for update in harness.updates[name] for event in update.events]
    assert [event.at for event in events] == sorted(event.at for event in events)
    return [event.name for event in events]


@pytest.mark.parametrize("held", [None, RequestState.WAITING_GRAMMAR, RequestState.WAITING_REMOTE_KV])
@pytest.mark.parametrize("ends", ["length", "abort", "timeout", "error"])
def test_every_transition_is_told_with_its_time(held, ends):
    harness = Harness()
    harness.add("r", [1, 2, 3], 6, held=held, deadline=10.0 if ends == "timeout" else None)
    harness.clock.now += 1
    if held:
        harness.scheduler.ready("r")
    for _ in range(2):
        harness.clock.now += 1
        harness.step()
    if ends == "abort":
        harness.scheduler.abort("r")
    if ends == "error":
        harness.runner.fail_slots["r"] = "broken"
    harness.clock.now = 11.0
    harness.run()
    harness.collect()
    assert harness.reason("r") == ends
    assert names_of_events(harness, "r") == [
        "queued", *(["ready"] if held else []), "scheduled", "first_token", "finished",
    ]  # fmt: skip


def test_priority_goes_first_and_gives_way_last():
    harness = Harness(max_num_seqs=1, policy="priority")
    harness.add("running", [1], 3)
    harness.step()
    harness.add("later", [1], 3, priority=5)
    harness.add("urgent", [1], 3, priority=-5)
    harness.run()
    assert harness.order == ["running", "urgent", "later"]


def test_fair_does_not_let_a_flood_starve_a_small_tenant():
    harness = Harness(max_num_seqs=1, policy="fair")
    for i in range(20):
        harness.add(f"flood{i}", [1] * 20, 10, tenant="big")
    harness.step()
    harness.add("small0", [2] * 4, 4, tenant="small")
    harness.add("small1", [2] * 4, 4, tenant="small")
    harness.run()
    assert harness.order.index("small1") <= 3


def test_a_tenant_that_paused_does_not_hoard_its_pause():
    harness = Harness(max_num_seqs=1, policy="fair")
    for i in range(10):
        harness.add(f"a{i}", [1] * 8, 8, tenant="a")
    for _ in range(60):
        harness.step()
    done = len(harness.order)
    for i in range(10):
        harness.add(f"b{i}", [2] * 8, 8, tenant="b")
    harness.run()
    assert {name[0] for name in harness.order[done : done + 6]} == {"a", "b"}


def test_deadline_ends_a_request_in_any_state():
    harness = Harness(max_num_seqs=1)
    harness.add("running", [1], 100, deadline=5.0)
    harness.add("waiting", [1], 100, deadline=5.0)
    harness.add("held", [1], 100, deadline=5.0, held=RequestState.WAITING_MEDIA)
    harness.step()
    assert harness.scheduler.next_deadline == 5.0
    harness.clock.now = 5.0
    harness.step()
    assert {harness.reason(name) for name in ("running", "waiting", "held")} == {"timeout"}
    harness.run()


def test_a_failing_row_ends_alone():
    harness = Harness()
    for name in "abc":
        harness.add(name, [1, 2, 3], 6)
    harness.runner.fail_slots["b"] = "the grammar broke"
    harness.run()
    assert harness.reason("b") == "error"
    assert harness.updates["b"][-1].error == "the grammar broke"
    assert harness.tokens("a") == harness.tokens("c") == expected_output([1, 2, 3], 6)


def test_stop_tokens_end_of_text_and_min_tokens():
    prompt = [3, 1, 4]
    free = expected_output(prompt, 12)
    stop = free[4]
    first = free.index(stop)
    harness = Harness()
    harness.add("eos", prompt, 12, eos_token_ids=[stop])
    harness.add("ignored", prompt, 12, eos_token_ids=[stop], ignore_eos=True)
    harness.add("token", prompt, 12, stop_token_ids=[stop])
    harness.add("late", prompt, 12, stop_token_ids=[stop], min_tokens=first + 2)
    harness.run()
    assert harness.tokens("eos") == harness.tokens("token") == free[: first + 1]
    assert (harness.updates["eos"][-1].stop_reason, harness.updates["token"][-1].stop_reason) == (None, stop)
    assert harness.tokens("ignored") == free
    assert len(harness.tokens("late")) > first + 1


def test_prompt_logprobs_come_whole_and_once():
    harness = Harness(max_num_batched_tokens=8)
    prompt = list(range(30))
    harness.add("warm", prompt)
    harness.run()
    harness.add("r", prompt, 3, prompt_logprobs=0)
    harness.add("only", prompt, 0, prompt_logprobs=0)
    harness.run()
    for name in ("r", "only"):
        got = [entry.token_id for update in harness.updates[name] for entry in update.prompt_logprobs]
        assert got == prompt[1:]
    assert harness.tokens("only") == []


def test_what_can_never_run_is_refused_at_the_door():
    harness = Harness(num_blocks=5, max_model_len=100)
    with pytest.raises(RequestError, match="empty_prompt|at least 1 token"):
        harness.add("empty", [])
    with pytest.raises(RequestError, match="context"):
        harness.add("long", [1] * 100, 4)
    with pytest.raises(RequestError, match="--kv-cache-memory-bytes"):
        harness.add("big", [1] * 30, 20)
    harness.add("fits", [1] * 30, 2)
    with pytest.raises(RequestError, match="in use"):
        harness.add("fits", [1], 2)
    harness.run()


def test_max_tokens_stops_at_the_context_limit():
    harness = Harness(max_model_len=20)
    harness.add("r", [1] * 15, None)
    harness.run()
    assert len(harness.tokens("r")) == 5
    assert harness.reason("r") == "length"


def test_sliding_windows_give_blocks_back_while_running():
    harness = Harness(groups=[KVGroup(kind="sliding", window=16)], num_blocks=8)
    harness.add("r", [1], 200)
    most = 0
    while harness.scheduler.has_work:
        harness.step()
        most = max(most, harness.scheduler.kv.pools[0].num_held)
    assert most <= 4
    assert harness.tokens("r") == expected_output([1], 200)


def test_async_scheduling_plans_the_next_step_before_the_result_is_there():
    harness = Harness(depth=2)
    harness.add("r", [1, 2, 3], 5)
    first = harness.scheduler.plan_step()
    second = harness.scheduler.plan_step()
    assert (first.num_tokens, second.num_tokens) == ([3], [1])
    results = [harness.runner.execute(first), harness.runner.execute(second)]
    for plan, result in zip((first, second), results, strict=True):
        harness.scheduler.finish_step(plan, result)
    harness.collect()
    assert harness.tokens("r") == expected_output([1, 2, 3], 2)
    assert next_token([1, 2, 3]) == harness.tokens("r")[0]
    harness.run()


def test_abort_of_an_unknown_request_is_not_an_error():
    harness = Harness()
    assert not harness.scheduler.abort("nobody", FinishReason.ABORT)
    assert not harness.scheduler.ready("nobody")


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_catching_up_is_as_good_as_the_steps_that_were_left_out(policy: str) -> None:
    stepped, driven = Harness(policy=policy), Harness(policy=policy)
    for harness in (stepped, driven):
        harness.add("a", list(range(20)), 30)
        harness.step()
    for _ in range(11):
        stepped.step()
    expected, request = stepped.scheduler.requests["a"], driven.scheduler.requests["a"]
    missed = expected.token_ids[request.num_tokens :]
    driven.scheduler.kv.grow(request, request.num_known + len(missed) - 1)
    driven.scheduler.catch_up(request, missed)
    names = ("token_ids", "num_known", "num_computed", "num_confirmed", "decodes_until", "grows_until")
    assert [getattr(request, name) for name in names] == [getattr(expected, name) for name in names]
    assert len(request.hashes) == len(expected.hashes)  # each scheduler has a secret of its own
    assert len(request.tables[0]) == len(expected.tables[0])
    caches = [len(harness.scheduler.kv.caches[0]) for harness in (stepped, driven)]
    assert caches[0] == caches[1] > 2
    assert stepped.scheduler.stats().generated_tokens == driven.scheduler.stats().generated_tokens
    assert driven.scheduler.rank(request) == stepped.scheduler.rank(expected)


def test_tokens_spent_elsewhere_are_not_planned() -> None:
    harness = Harness(max_num_batched_tokens=16)
    harness.add("a", list(range(40)))
    assert harness.scheduler.plan_step(spent_tokens=10).total_tokens == 6
