"""One engine in virtual time: the real scheduler, and a cost model where the device would be."""

from __future__ import annotations

from collections import deque

from common_platform.errors import RequestError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup
from servekit.core.plan import StepPlan, StepResult
from servekit.core.request import DecodedTokens, Request
from servekit.core.scheduler import Scheduler
from servekit.sampling.parameters import SamplingParams
from servekit.simulate.cost import CostModel, StepShape, row_pairs
from servekit.simulate.job import Job
from servekit.simulate.record import Gaps, Record, Sample, Timeline


class SimulatedRequest(Request):
    """A request whose answer is known, with its record."""

    def __init__(self, request_id: str, job: Job, record: Record, params: SamplingParams, arrival: float) -> None:
        super().__init__(
            request_id,
            job.prompt_token_ids(),
            params,
            priority=job.priority,
            tenant=job.tenant,
            clock=lambda: arrival,
        )
        self.record = record
        self.num_starts = 0
        self.answer_offset = job.output.start - self.num_prompt  # plus a position: the token that stands there

    def next_token(self) -> int:
        return self.answer_offset + len(self.token_ids)


class Replica:
    """An engine that plans a step, lets its cost pass, and takes its result in, one step after the other.

    Args:
        index: its place among the replicas.
    """

    def __init__(self, index: int, config: SchedulerConfig, cache: CacheConfig, cost: CostModel) -> None:
        self.index = index
        self.now = 0.0  # the end of the last step
        self.scheduler = Scheduler(config, cache, [KVGroup()], clock=lambda: self.now)
        self.gaps = Gaps()
        self.timeline = Timeline()
        self.ended: deque[Record] = deque()  # since they were last looked at
        self.num_steps = 0
        self.busy_s = 0.0
        self.held_block_s = 0.0  # blocks held, summed over time
        self.most_held = 0
        self.computed_tokens = 0
        self._pool = self.scheduler.kv.pools[0]
        self._seconds = cost.seconds
        self._by_slot: list[SimulatedRequest | None] = [None] * config.max_num_seqs
        self._params: dict[int, SamplingParams] = {}
        self._requests: dict[str, SimulatedRequest] = {}
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.requests) - self.num_running

    def add(self, job: Job, arrival: float) -> Record:
        """Queue ``job``; one that could never be served is refused, and its record says why."""
        if not self.has_work:
            if self.num_steps:
                self.timeline.add(Sample(self.now, 0.0, 0, 0))  # idle since then
            self.now = max(self.now, arrival)
        record = Record(job, self.index, arrival)
        num_output = len(job.output)
        params = self._params.get(num_output)
        if params is None:
            params = self._params[num_output] = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        self._num_added += 1
        request = SimulatedRequest(str(self._num_added), job, record, params, arrival)
        try:
            self.scheduler.add(request)
        except RequestError as error:
            record.reason, record.error, record.finished = "refused", str(error), arrival
            self.ended.append(record)
        else:
            self._requests[request.id] = request
        return record

    def advance(self, until: float) -> None:
        """Run every step that begins before ``until``."""
        while self.now < until and self.scheduler.requests:
            self._step()

    def _step(self) -> None:
        plan = self.scheduler.plan_step()
        self._finish(plan, StepShape(0, 0, 0, 0), self.num_waiting)

    def _finish(self, plan: StepPlan, beside: StepShape, num_waiting: int) -> None:
        """Let the time of ``plan`` and of the rows ``beside`` it pass, and take its tokens in."""
        for start in plan.starts:
            request = self._requests[start.request_id]
            self._by_slot[start.slot] = request
            request.num_starts += 1
        shape, sampled = self._shape_of(plan, beside)
        if not shape.tokens:
            raise RuntimeError("a step with nothing to compute while requests wait")
        before = self.now
        self.now += self._seconds(*shape)
        self._count(before, self.now, shape.tokens, num_waiting)
        if beside.rows:
            self.gaps.add(self.now - before, beside.rows)
        self.scheduler.finish_step(plan, StepResult(plan.step, [], sampled=sampled))
        self._take_updates()

    def _shape_of(self, plan: StepPlan, beside: StepShape) -> tuple[StepShape, list[int]]:
        tokens, rows, context, pairs = beside
        sampled = []
        for slot, num_tokens, samples in zip(plan.slots, plan.num_tokens, plan.samples, strict=True):
            request = self._by_slot[slot]
            if request is None:
                raise RuntimeError(f"slot {slot} is computed before it was started")
            tokens += num_tokens
            context += request.num_computed
            if num_tokens > 1:
                pairs += row_pairs(request.num_computed, num_tokens)
            if samples:
                sampled.append(request.next_token())
        return StepShape(tokens, rows + len(plan.slots), context, pairs), sampled

    def _count(self, before: float, after: float, tokens: int, num_waiting: int) -> None:
        held = self._pool.num_held
        self.num_steps += 1
        self.computed_tokens += tokens
        self.busy_s += after - before
        self.held_block_s += held * (after - before)
        self.most_held = max(self.most_held, held)
        if after >= self.timeline.next_at:
            usage = held / (self._pool.num_blocks - 1)
            num_running = len(self.scheduler.requests) - num_waiting
            self.timeline.add(Sample(after, usage, num_running, num_waiting))

    def _take_updates(self) -> None:
        requests, now = self._requests, self.now
        for update in self.scheduler.take_updates():
            if isinstance(update, DecodedTokens):
                for request_id in update.request_ids:
                    record = requests[request_id].record
                    record.num_output += 1
                    self._token_came(record, now)
                continue
            record = requests[update.request_id].record
            record.take(update)
            if update.token_ids:
                self._token_came(record, now)
            if update.finish_reason is not None:
                del requests[update.request_id]
                self.ended.append(record)

    def _token_came(self, record: Record, now: float) -> None:
        if record.last_token >= 0:
            self.gaps.add(now - record.last_token)
        record.last_token = now
