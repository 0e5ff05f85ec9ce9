"""The same steps without looking at every row in each of them.

A row that decodes needs nothing from the scheduler but a token a step, a block when its last one is full, and its end.
Such rows are *parked*: they leave ``scheduler.running`` and are counted, not visited, until the step in which more
than that happens to them; then they are brought up to date and the real scheduler plans them. A step in which no row is
awake and no request could be admitted is an addition to the clock.

What makes it exact, event for event (docs/design/0004-fast-forward.md says why):

- parked rows have their tokens and blocks before anybody else could want them, else all are woken;
- they are awake in each step that ends them, or that fills a block whose content another request could hold;
- the clock adds step by step, in the order and with the roundings of the slow way.
"""

from __future__ import annotations

from typing import Any

from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.simulate.cost import CostModel, StepShape
from servekit.simulate.job import Job
from servekit.simulate.record import Record, Sample
from servekit.simulate.replica import Replica, SimulatedRequest

LEAST_STEPS = 2  # parked for fewer costs more than it saves
MOST_FAIR_TENANTS = 1024  # with more, the fair policy forgets some, step by step


class FastReplica(Replica):
    """A ``Replica`` that gives the same answers sooner."""

    def __init__(self, index: int, config: SchedulerConfig, cache: CacheConfig, cost: CostModel) -> None:
        super().__init__(index, config, cache, cost)
        kv = self.scheduler.kv
        self._size = kv.block_size
        self._shares = kv.shares_prefixes
        self._all_or_none = config.policy == "fair"  # each token of a row changes the order
        self._tenants: set[str] = set()
        self._step_number = 0
        self._parked: dict[SimulatedRequest, int] = {}  # -> the step that it missed first
        self._wakes: dict[int, list[SimulatedRequest]] = {}  # step -> rows that must be awake in it
        self._growers: list[dict[SimulatedRequest, None]] = [{} for _ in range(self._size)]  # by step modulo block size
        self._context = 0  # that the parked rows read in the next step
        self._last_rank: Any = None  # no parked row has a higher one
        self._is_settled = False  # nothing has changed since the last time that nobody was admitted

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running) + len(self._parked)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.requests) - self.num_running

    def add(self, job: Job, arrival: float) -> Record:
        if self._all_or_none:
            self._wake_all()  # who arrives is ranked by what the others have had
            self._tenants.add(job.tenant)
        self._is_settled = False
        return super().add(job, arrival)

    def advance(self, until: float) -> None:
        scheduler = self.scheduler
        while self.now < until and scheduler.requests:
            for request in self._wakes.pop(self._step_number, ()):
                self._wake(request)
            if not scheduler.running and not self._may_admit():
                self._decode_parked(until)
            else:
                self._step()

    def _may_admit(self) -> bool:
        """Whether the next plan could start a request that the last one did not."""
        if not self.num_waiting or self.num_running >= self.scheduler.config.max_num_seqs:
            return False
        return self._all_or_none or not self._is_settled

    # --- steps without the scheduler ---

    def _decode_parked(self, until: float) -> None:
        """One token for each parked row, step after step, until something else is to be done."""
        rows, wakes, growers, size = len(self._parked), self._wakes, self._growers, self._size
        pool, seconds, gaps, timeline = self._pool, self._seconds, self.gaps, self.timeline
        now, step, context, held = self.now, self._step_number, self._context, pool.num_held
        busy_s, held_block_s = self.busy_s, self.held_block_s
        while now < until and step not in wakes:
            growing = growers[step % size]
            if growing:
                if len(growing) > pool.num_free:
                    break
                self._grow(growing)
                held = pool.num_held
            after = now + seconds(rows, rows, context, 0)
            gaps.add(after - now, rows)
            busy_s += after - now
            held_block_s += held * (after - now)
            if after >= timeline.next_at:
                timeline.add(Sample(after, held / (pool.num_blocks - 1), rows, self.num_waiting))
            now, step, context = after, step + 1, context + rows
        self.num_steps += step - self._step_number
        self.computed_tokens += rows * (step - self._step_number)
        self.now, self._step_number, self._context = now, step, context
        self.busy_s, self.held_block_s, self.most_held = busy_s, held_block_s, max(self.most_held, held)
        if now < until and step not in wakes:
            self._wake_all()  # blocks are short

    def _grow(self, growing: dict[SimulatedRequest, None]) -> None:
        for request, block in zip(growing, self._pool.allocate(len(growing)), strict=True):
            request.tables[0].append(block)

    # --- steps with it ---

    def _step(self) -> None:
        growing = self._growers[self._step_number % self._size]
        if self._parked and (self._all_or_none or not self._has_blocks(len(growing)) or not self._has_tokens()):
            self._wake_all()
        if growing:
            self._grow(growing)
        rows, num_running = len(self._parked), self.num_running
        beside = StepShape(rows, rows, self._context, 0)
        plan = self.scheduler.plan_step(spent_tokens=rows)
        self._is_settled = not plan.slots
        self._finish(plan, beside, self.num_waiting)
        self._step_number += 1
        self._context += rows
        self._park(is_same=not plan.starts and num_running == self.num_running)

    def _has_blocks(self, num_growing: int) -> bool:
        """Whether nobody can be preempted in the next step."""
        needed = num_growing
        for request in self.scheduler.running:
            needed += max(-(-request.num_known // self._size) - len(request.tables[0]), 0)
        return needed <= self._pool.num_free

    def _has_tokens(self) -> bool:
        """Whether every parked row gets its token in the next step, in whatever order."""
        threshold = self.scheduler.config.long_prefill_token_threshold
        left = self.scheduler.config.max_num_batched_tokens - len(self._parked)
        prefills = []
        for request in self.scheduler.running:
            if request.num_uncomputed > 1:
                prefills.append(request)
            else:
                left -= 1
        wanted = sum(min(row.num_uncomputed, threshold or row.num_uncomputed) for row in prefills)
        if wanted <= left:
            return True
        return left >= 0 and all(self.scheduler.rank(row) > self._last_rank for row in prefills)

    # --- parking ---

    def _park(self, *, is_same: bool) -> None:
        """Take the rows that only decode for a while out of ``running``; ``is_same``: as it was before the step."""
        running: list[SimulatedRequest] = self.scheduler.running  # type: ignore[assignment]
        if self.num_running > self.scheduler.config.max_num_batched_tokens:
            return
        steps = [self._steps_to_park(row) for row in running]
        if self._all_or_none and not (is_same and self._may_all_park(steps)):
            return
        awake = []
        for request, num_steps in zip(running, steps, strict=True):
            if num_steps >= LEAST_STEPS:
                self._park_row(request, num_steps)
            else:
                awake.append(request)
        running[:] = awake

    def _may_all_park(self, steps: list[int]) -> bool:
        few_tenants = len(self._tenants) <= MOST_FAIR_TENANTS  # the policy forgets none then
        return few_tenants and not self._may_admit() and min(steps, default=0) >= LEAST_STEPS

    def _steps_to_park(self, request: SimulatedRequest) -> int:
        """How many steps from the next one on are plain decodes of ``request``."""
        known = request.num_known
        if request.record.last_token != self.now or request.num_computed != known - 1:
            return 0  # it had no token in the last step, or computes again what it had before a preemption
        steps = request.max_total - 1 - known
        if self._shares:
            fills = -known % self._size  # steps until one fills a block
            if request.num_starts == 1:
                shared = self._shared_until(request)
                fills = shared - known if known <= shared else steps
            steps = min(steps, fills)
        return steps

    def _shared_until(self, request: SimulatedRequest) -> int:
        """Blocks of answers that are full after so many tokens could be another request's too; later ones could not.

        Answers differ, but a block is looked up by what is before it: the first with an answer may follow a prompt that
        others have as well.
        """
        whole = request.num_prompt // self._size * self._size
        own = request.record.job.own_from
        return 0 if own is not None and own < whole else whole + self._size

    def _park_row(self, request: SimulatedRequest, num_steps: int) -> None:
        now, known = self._step_number, request.num_known
        self._parked[request] = now
        self._context += known
        self._wakes.setdefault(now + num_steps, []).append(request)
        room = len(request.tables[0]) * self._size
        self._growers[(now + room + 1 - known) % self._size][request] = None
        rank = self.scheduler.rank(request)
        if self._last_rank is None or rank > self._last_rank:
            self._last_rank = rank

    def _wake_all(self) -> None:
        for request in list(self._parked):
            self._wake(request)
        self._wakes.clear()
        self._last_rank = None

    def _wake(self, request: SimulatedRequest) -> None:
        """Back into ``running``, as if it had been there all the time."""
        since = self._parked.pop(request)
        known, count = request.num_known, self._step_number - since
        room = len(request.tables[0]) * self._size
        del self._growers[(since + room + 1 - known) % self._size][request]
        self._context -= known + count
        first = request.next_token()
        self.scheduler.catch_up(request, range(first, first + count))
        request.record.num_output += count
        request.record.last_token = self.now
        self.scheduler.running.append(request)
