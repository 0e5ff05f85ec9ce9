"""Answers that can be computed by hand, and what must hold of every simulation."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common_platform.errors import ConfigError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.simulate import CostModel, Job, MadeUpTokens, Outcome, SimulationConfig, simulate
from servekit.simulate.job import turns_of
from servekit.simulate.report import Report, latency
from servekit.simulate.synthetic import Lengths, SyntheticWorkload

COST = CostModel(step_s=1.0, token_s=0.01, row_s=0.1, context_s=0.001, pair_s=0.0001)
PLAIN = CostModel(step_s=1.0)


def config(*, cost: CostModel = PLAIN, num_blocks: int = 512, caching: bool = True, **more: Any) -> SimulationConfig:
    names = ("num_replicas", "router", "fast_forward")
    ours = {name: more.pop(name) for name in names if name in more}
    scheduler = SchedulerConfig(**({"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512} | more))
    cache = CacheConfig(num_blocks=num_blocks, block_size=8, enable_prefix_caching=caching)
    return SimulationConfig(cost=cost, scheduler=scheduler, cache=cache, **ours)


def job(made: MadeUpTokens, num_prompt: int, num_output: int, at: float = 0.0, **more: Any) -> Job:
    return Job(at, (made.take(num_prompt),), made.take(num_output), **more)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast_forward(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_one_request_costs_a_prefill_and_a_decode_for_every_token_after_the_first(fast_forward: bool) -> None:
    outcome = simulate([job(MadeUpTokens(), 10, 20, at=3.0)], config(cost=COST, fast_forward=fast_forward))
    (record,) = outcome.records
    prefill = 1.0 + 0.01 * 10 + 0.1 + 0.001 * 10 + 0.0001 * 45  # 9 tokens before the last see 1 + 2 + ... + 9
    decodes = sum(1.0 + 0.01 + 0.1 + 0.001 * context for context in range(11, 30))
    assert record.scheduled == 3.0
    assert record.first_token == pytest.approx(3.0 + prefill)
    assert record.finished == pytest.approx(3.0 + prefill + decodes)
    report = Report.of(outcome)
    assert report.ttft_s is not None and report.itl_s is not None
    assert report.ttft_s.p50 == report.ttft_s.max == pytest.approx(prefill)
    assert report.itl_s.mean == pytest.approx(decodes / 19)
    assert report.itl_s.max == pytest.approx(1.0 + 0.01 + 0.1 + 0.001 * 29)


def test_a_request_that_comes_within_a_step_waits_for_its_end(fast_forward: bool) -> None:
    made = MadeUpTokens()
    jobs = [job(made, 4, 5), job(made, 4, 5, at=1.5), job(made, 4, 5, at=3.0), job(made, 4, 1, at=100.0)]
    records = simulate(jobs, config(fast_forward=fast_forward)).records
    assert [record.scheduled for record in records] == [0.0, 2.0, 3.0, 100.0]
    assert [record.finished for record in records] == [5.0, 7.0, 8.0, 101.0]


def test_a_prompt_longer_than_the_budget_takes_several_steps(fast_forward: bool) -> None:
    made = MadeUpTokens()
    outcome = simulate([job(made, 20, 30), job(made, 130, 2, at=4.5)], config(fast_forward=fast_forward))
    first, second = outcome.records
    assert second.scheduled == 5.0
    assert second.first_token == 8.0  # 63, 63 and 4 tokens beside one decode
    assert first.finished == 30.0


def test_what_the_pool_cannot_hold_together_waits_or_is_preempted_and_computed_again(fast_forward: bool) -> None:
    made = MadeUpTokens()
    tight = config(num_blocks=9, caching=False, fast_forward=fast_forward)  # 64 tokens
    outcome = simulate([job(made, 24, 24), job(made, 24, 24)], tight)
    first, second = outcome.records
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert first.finished == 24.0
    assert second.finished > 24.0
    assert Report.of(outcome).computed_tokens > 2 * (24 + 23)


def test_a_shared_prefix_is_computed_once(fast_forward: bool) -> None:
    made = MadeUpTokens()
    prefix = made.take(40)
    jobs = [Job(at, (prefix, made.take(8)), made.take(4)) for at in (0.0, 10.0, 20.0)]
    outcome = simulate(jobs, config(fast_forward=fast_forward))
    assert [record.num_cached for record in outcome.records] == [0, 40, 40]
    assert Report.of(outcome).prefix_hit_rate == pytest.approx(80 / 144)


def test_the_next_turn_finds_the_answer_before_it_in_the_cache(fast_forward: bool) -> None:
    made = MadeUpTokens()
    first = job(made, 16, 17, think_s=2.5)
    first.follow_up = Job(0.0, (*first.prompt, first.output, made.take(8)), made.take(2))
    records = simulate([first], config(fast_forward=fast_forward)).records
    assert records[1].arrival == records[0].finished + 2.5
    assert records[1].num_cached == 32  # of the 33 tokens, the last answered one was never computed


def test_an_impossible_request_is_refused_and_told_and_the_others_go_on(fast_forward: bool) -> None:
    made = MadeUpTokens()
    jobs = [job(made, 600, 5), job(made, 5, 5), job(made, 100, 100)]
    report = Report.of(simulate(jobs, config(num_blocks=20, fast_forward=fast_forward)))
    assert (report.requests, report.finished, report.refused) == (3, 1, 2)
    assert "600" in report.first_refusal


def test_nothing_is_simulated_and_reported_without_requests() -> None:
    report = Report.of(simulate([], config()))
    assert (report.requests, report.duration_s, report.ttft_s, report.kv_over_time) == (0, 0.0, None, [])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    turns=st.integers(1, 3),
    num_replicas=st.integers(1, 5),
    router=st.sampled_from(["round_robin", "least_loaded", "prefix_aware"]),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
)
def test_every_request_ends_once_with_all_its_tokens(seed, turns, num_replicas, router, policy) -> None:
    workload = SyntheticWorkload(
        num_requests=30,
        request_rate=random.Random(seed).choice([0.1, 2.0, float("inf")]),
        prompt_tokens=Lengths.parse("uniform:1:60", "prompt_tokens"),
        output_tokens=Lengths.parse("lognormal:12:0.7", "output_tokens"),
        num_turns=turns,
        num_tenants=3,
        num_priorities=3,
        seed=seed,
    )
    jobs = workload.jobs()
    asked = [turn for first in jobs for turn in turns_of(first)]
    settled = config(num_blocks=80, num_replicas=num_replicas, router=router, policy=policy)
    outcome = simulate(jobs, settled)
    assert sorted(id(record.job) for record in outcome.records) == sorted(map(id, asked))
    served = [record for record in outcome.records if record.reason != "refused"]
    for record in served:
        assert record.num_output == min(len(record.job.output), 512 - record.job.num_prompt)
        assert record.arrival <= record.scheduled < record.first_token <= record.finished
    report = Report.of(outcome)
    assert report.finished + report.refused == report.requests == len(asked)
    assert report.output_tokens == sum(replica.output_tokens for replica in report.replicas)
    gaps = sum(sum(replica.gaps.counts) for replica in outcome.replicas)
    assert gaps == report.output_tokens - report.finished
    assert all(not replica.has_work for replica in outcome.replicas)
    assert all(replica.scheduler.kv.pools[0].num_held == 0 for replica in outcome.replicas)


def saturated(num_replicas: int, router: str = "round_robin") -> Report:
    workload = SyntheticWorkload(num_requests=240, request_rate=float("inf"), seed=3)
    return Report.of(simulate(workload.jobs(), config(cost=COST, num_replicas=num_replicas, router=router)))


@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "prefix_aware"])
def test_more_replicas_never_do_less(router: str) -> None:
    rates = [saturated(num_replicas, router).tokens_per_s for num_replicas in (1, 2, 3, 5, 8)]
    assert rates == sorted(rates)
    assert rates[-1] > 6 * rates[0]


def prefixes(router: str, seed: int) -> Report:
    workload = SyntheticWorkload(
        num_requests=200,
        request_rate=0.5,
        prompt_tokens=Lengths.parse("uniform:8:24", "prompt_tokens"),
        output_tokens=Lengths.parse("fixed:8", "output_tokens"),
        num_prefix_groups=24,
        prefix_tokens=96,
        seed=seed,
    )
    return Report.of(simulate(workload.jobs(), config(num_blocks=120, num_replicas=4, router=router)))


@pytest.mark.parametrize("seed", range(5))
def test_routing_by_prefix_finds_more_in_the_caches_than_taking_turns(seed: int) -> None:
    aware, blind = prefixes("prefix_aware", seed), prefixes("round_robin", seed)
    assert aware.prefix_hit_rate > blind.prefix_hit_rate
    assert aware.imbalance < 2.0


def test_the_least_loaded_replica_is_the_one_with_the_fewest_tokens_to_do() -> None:
    made = MadeUpTokens()
    jobs = [job(made, 100, 300), job(made, 4, 2), job(made, 4, 2, at=0.5), job(made, 4, 2, at=50.0)]
    records = simulate(jobs, config(num_replicas=2, router="least_loaded")).records
    assert [record.replica for record in records] == [0, 1, 1, 1]


def test_a_thousand_replicas_share_the_work_evenly() -> None:
    workload = SyntheticWorkload(
        num_requests=3000, request_rate=3000.0, output_tokens=Lengths.parse("uniform:10:100", "output_tokens")
    )
    outcome = simulate(workload.jobs(), config(cost=COST, num_replicas=1000, router="least_loaded"))
    report = Report.of(outcome)
    assert report.finished == 3000
    assert {replica.requests for replica in report.replicas} <= set(range(1, 8))


def test_the_same_seed_gives_the_same_simulation_and_another_one_does_not() -> None:
    def once(seed: int) -> Report:
        return Report.of(simulate(SyntheticWorkload(num_requests=50, seed=seed).jobs(), config(cost=COST)))

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_quantiles_are_values_that_were_seen_each_as_often_as_it_was() -> None:
    found = latency([3.0, 1.0, 2.0], [1, 97, 2])
    assert found is not None
    assert (found.p50, found.p95, found.p99, found.max) == (1.0, 1.0, 2.0, 3.0)
    assert found.mean == pytest.approx((97 + 4 + 3) / 100)
    assert latency([]) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_replicas": 0}, "num_replicas"),
        ({"router": "random"}, "router"),
        ({"cache": CacheConfig(num_blocks=9, num_offload_blocks=4)}, "num_offload_blocks"),
    ],
)
def test_an_impossible_simulation_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(config(), **changes)
    assert caught.value.param == word


def _held_over_time(outcome: Outcome) -> list[float]:
    return [point.kv_usage for point in Report.of(outcome).kv_over_time]


def test_memory_over_time_rises_falls_and_is_empty_in_a_pause(fast_forward: bool) -> None:
    made = MadeUpTokens()
    jobs = [job(made, 30, 50), job(made, 30, 50, at=1000.0)]
    use = _held_over_time(simulate(jobs, config(num_blocks=21, fast_forward=fast_forward)))
    assert max(use) == pytest.approx(10 / 20)
    assert use[len(use) // 2] == 0.0
    assert use[-2] > 0.0
