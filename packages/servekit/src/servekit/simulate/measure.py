"""What steps of a real engine take, over a grid of shapes."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from common_platform.errors import ConfigError
from servekit.core.plan import StepPlan
from servekit.core.request import Request
from servekit.engine.collector import fewer_collections
from servekit.engine.config import EngineConfig
from servekit.engine.engine import EngineCore
from servekit.engine.validate import EngineRequest
from servekit.sampling.parameters import SamplingParams
from servekit.simulate.cost import row_pairs
from servekit.simulate.profile import MeasuredStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The shapes to measure: for each, so many prompts of one length, and a few tokens of answers to them."""

    num_rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    num_prompt_tokens: Sequence[int] = (1, 16, 64, 256, 512)
    num_decodes: int = 4
    num_repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_prompt_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"grid.{name}", getattr(self, name), "at least one number, each 1 or more")
        for name in ("num_decodes", "num_repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"grid.{name}", getattr(self, name), "1 or more")


def measure(config: EngineConfig, grid: Grid | None = None) -> list[MeasuredStep]:
    """Run the engine of ``config`` over ``grid``, and time each step: planned, computed, and its result taken in.

    Steps are taken one at a time, without drafts. What does not fit the engine's rows, context or cache is left out;
    the first round warms up and is not kept.

    Raises:
        ArtifactError: the model folder cannot be used.
        ConfigError: a setting is out of its range, or nothing of the grid fits.
    """
    core = EngineCore(msgspec.structs.replace(config, async_scheduling=False, speculative_config=None))
    try:
        measuring = _Measuring(core, grid or Grid())
        with fewer_collections():
            return list(measuring.steps())
    finally:
        core.stop()


class _Measuring:
    def __init__(self, core: EngineCore, grid: Grid) -> None:
        self._core, self._grid = core, grid
        self._chance = random.Random(0)
        self._numbers = itertools.count()
        self._rows: dict[int, Request] = {}  # by slot

    def steps(self) -> Iterator[MeasuredStep]:
        shapes = [
            shape
            for shape in itertools.product(self._grid.num_rows, self._grid.num_prompt_tokens)
            if self._fits(*shape)
        ]
        if not shapes:
            limit = "rows, prompts and cache that hold at least one shape of the grid"
            raise ConfigError("max_num_seqs", self._core.scheduler.config.max_num_seqs, limit, flag="--max-num-seqs")
        for round_number in range(self._grid.num_repeats + 1):
            for num_rows, num_prompt in shapes:
                measured = list(self._run(num_rows, num_prompt))
                if round_number:
                    yield from measured

    def _fits(self, num_rows: int, num_prompt: int) -> bool:
        scheduler, cache = self._core.scheduler.config, self._core.cache
        each = num_prompt + self._grid.num_decodes + 1
        blocks = num_rows * -(-each // cache.block_size)
        return num_rows <= scheduler.max_num_seqs and each <= scheduler.max_model_len and blocks <= cache.usable_blocks

    def _run(self, num_rows: int, num_prompt: int) -> Iterator[MeasuredStep]:
        params = SamplingParams(
            max_tokens=self._grid.num_decodes + 1, temperature=0.0, ignore_eos=True, detokenize=False
        )
        for _ in range(num_rows):
            prompt = [self._chance.randrange(self._core.facts.vocab_size) for _ in range(num_prompt)]
            self._core.add(
                EngineRequest(request_id=f"m{next(self._numbers)}", prompt_token_ids=prompt, sampling=params)
            )
        scheduler, executor = self._core.scheduler, self._core.executor
        while scheduler.has_work:
            start = time.perf_counter()
            plan = scheduler.plan_step()
            planned = time.perf_counter() - start
            shape = self._shape_of(plan)
            start = time.perf_counter()
            scheduler.finish_step(plan, executor.execute(plan))
            seconds = planned + time.perf_counter() - start
            scheduler.take_updates()
            yield MeasuredStep(**shape, seconds=seconds)

    def _shape_of(self, plan: StepPlan) -> dict[str, int]:
        for row in plan.starts:
            self._rows[row.slot] = self._core.scheduler.requests[row.request_id]
        ends = [self._rows[slot].num_computed for slot in plan.slots]
        pairs = sum(row_pairs(end, count) for end, count in zip(ends, plan.num_tokens, strict=True))
        return {"tokens": plan.total_tokens, "rows": len(ends), "context": sum(ends), "pairs": pairs}
