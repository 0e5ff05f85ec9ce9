"""How much of the KV pool is allocated and holds no token, over a mixed trace: 64 sequences, in and out 16..256.

vLLM's paper found 60-80 % wasted by systems that reserve room for the longest answer, and under 4 % with paging.
"""

from __future__ import annotations

import random

from common import Report, arguments
from servekit.core.config import BLOCK_SIZES, CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup
from servekit.core.plan import StepResult
from servekit.core.request import Request
from servekit.core.scheduler import Scheduler
from servekit.sampling.parameters import SamplingParams

ROWS, SHORTEST, LONGEST = 64, 16, 256
POOL_TOKENS = ROWS * 2 * LONGEST


def shares_of_waste(block_size: int, num_requests: int) -> tuple[float, float]:
    """Room in held blocks without a token: of the pool, and of the room that is held; means over steps."""
    chance = random.Random(7)
    cache = CacheConfig(num_blocks=POOL_TOKENS // block_size + 1, block_size=block_size)
    config = SchedulerConfig(max_num_seqs=ROWS, max_num_batched_tokens=2048, max_model_len=2 * LONGEST)
    scheduler = Scheduler(config, cache, [KVGroup()])
    for i in range(num_requests):
        prompt = [chance.randrange(50_000) for _ in range(chance.randint(SHORTEST, LONGEST))]
        params = SamplingParams(max_tokens=chance.randint(SHORTEST, LONGEST), ignore_eos=True)
        scheduler.add(Request(f"r{i}", prompt, params))
    of_pool, of_held = [], []
    while scheduler.has_work:
        plan = scheduler.plan_step()
        tokens = sum(request.num_computed for request in scheduler.running)
        held = scheduler.kv.pools[0].num_held * block_size
        if len(scheduler.running) == ROWS:
            of_pool.append((held - tokens) / (cache.usable_blocks * block_size))
            of_held.append((held - tokens) / held)
        scheduler.finish_step(plan, StepResult(plan.step, [], sampled=[7] * sum(plan.samples)))
        scheduler.take_updates()
    return sum(of_pool) / len(of_pool), sum(of_held) / len(of_held)


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    for block_size in BLOCK_SIZES:
        of_pool, of_held = shares_of_waste(block_size, 300 if options.quick else 3000)
        report.figure(f"waste_of_pool_block_size_{block_size}_percent", of_pool * 100)
        report.figure(f"waste_of_held_block_size_{block_size}_percent", of_held * 100)
        if block_size == 16:
            report.target("KV memory wasted, percent of the pool, blocks of 16", of_pool * 100, "<=", 4.0)
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
