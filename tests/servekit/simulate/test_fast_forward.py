"""Fast-forward gives what the slow way gives, bit for bit, on workloads that press on every limit."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.scheduler import Scheduler
from servekit.simulate import CostModel, Job, MadeUpTokens, Outcome, SimulationConfig, simulate
from servekit.simulate.record import Record

COST = CostModel(step_s=0.01, token_s=0.0003, row_s=0.0007, context_s=1.1e-5, pair_s=1e-6)


def everything(outcome: Outcome) -> dict[str, Any]:
    """All that a simulation tells, and the state in which it left the pools."""
    records = [
        {name: getattr(record, name) for name in Record.__slots__ if name != "job"} for record in outcome.records
    ]
    replicas = []
    for replica in outcome.replicas:
        gaps: dict[float, int] = {}
        for seconds, count in zip(replica.gaps.seconds, replica.gaps.counts, strict=True):
            gaps[seconds] = gaps.get(seconds, 0) + count
        kv, stats = replica.scheduler.kv, replica.scheduler.stats()
        told = {name: getattr(replica, name) for name in ("num_steps", "busy_s", "held_block_s", "most_held", "now")}
        told |= {"computed": replica.computed_tokens, "gaps": gaps, "timeline": replica.timeline.samples}
        told |= {"free": kv.pools[0].num_free, "cached": len(kv.caches[0]), "preemptions": stats.preemptions}
        told |= {"hits": stats.prefix_hit_tokens, "asked": stats.prefix_queried_tokens}
        replicas.append(told)
    return {"records": records, "replicas": replicas}


def random_jobs(chance: random.Random, num_jobs: int, longest: int, *, sessions: bool) -> list[Job]:
    made = MadeUpTokens()
    groups = [made.take(longest) for _ in range(3)]
    spread = chance.choice([0.0, 0.5, 5.0])
    jobs = []
    for _ in range(num_jobs):
        shared = chance.choice(groups)[: chance.randrange(longest // 2)]
        own = made.take(chance.randint(0 if shared else 1, longest // 2))
        prompt = (shared, own)
        job = Job(
            chance.random() * spread,
            prompt,
            made.take(chance.choice([1, 2, chance.randint(1, longest // 2), chance.randint(1, longest // 2)])),
            priority=chance.randrange(3),
            tenant=chance.choice("abc"),
            own_from=chance.choice([None, len(shared)]),
        )
        jobs.append(job)
        while sessions and chance.random() < 0.4:
            prompt = (*job.prompt, job.output, made.take(chance.randint(1, 8)))
            job.think_s = chance.choice([0.0, 0.3])
            job.follow_up = Job(0.0, prompt, made.take(chance.randint(1, 12)), job.priority, job.tenant)
            job.follow_up.own_from = chance.choice([None, job.num_tokens])
            job = job.follow_up
    return jobs


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    block_size=st.sampled_from([8, 16]),
    num_blocks=st.integers(8, 60),
    max_num_seqs=st.integers(1, 12),
    budget=st.sampled_from([4, 16, 64, 512]),
    threshold=st.sampled_from([0, 0, 8]),
    caching=st.booleans(),
    num_replicas=st.sampled_from([1, 1, 1, 3]),
    router=st.sampled_from(["round_robin", "least_loaded", "prefix_aware"]),
    sessions=st.booleans(),
)
def test_fast_forward_is_the_slow_way_bit_for_bit(
    seed, policy, block_size, num_blocks, max_num_seqs, budget, threshold, caching, num_replicas, router, sessions
):
    chance = random.Random(seed)
    config = SimulationConfig(
        cost=COST,
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=chance.choice([60, 100, 400]),
            long_prefill_token_threshold=threshold,
            policy=policy,
        ),
        cache=CacheConfig(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=caching),
        num_replicas=num_replicas,
        router=router,
    )
    longest = min(120, (num_blocks - 1) * block_size)
    jobs = random_jobs(chance, chance.randint(1, 40), longest, sessions=sessions)
    fast = everything(simulate(jobs, config))
    slow = everything(simulate(jobs, replace(config, fast_forward=False)))
    assert fast["records"] == slow["records"]
    for one, other in zip(fast["replicas"], slow["replicas"], strict=True):
        assert {name: told for name, told in one.items() if told != other[name]} == {}


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_few_steps_are_planned_where_little_happens(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, planned = MadeUpTokens(), []
    plan_step = Scheduler.plan_step
    monkeypatch.setattr(Scheduler, "plan_step", lambda self, **more: planned.append(1) or plan_step(self, **more))
    scheduler = SchedulerConfig(max_num_seqs=8, max_model_len=1000, policy=policy)
    config = SimulationConfig(cost=COST, scheduler=scheduler, cache=CacheConfig(num_blocks=800))
    jobs = [Job(0.0, (made.take(30),), made.take(900)) for _ in range(8)]
    outcome = simulate(jobs, config)
    assert outcome.replicas[0].num_steps == 900
    assert len(planned) < 20
