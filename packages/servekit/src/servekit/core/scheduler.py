"""Who runs in the next step, how many tokens each, and on which blocks.

A step's tokens are a budget. Running requests spend it first, then waiting ones are admitted; there is no prefill
phase and no decode phase, only requests with tokens that are not computed yet (as in vLLM's V1; chunked prefill:
Agrawal et al., "Sarathi-Serve", OSDI 2024; continuous batching: Yu et al., "Orca", OSDI 2022; paging: Kwon et al.,
"PagedAttention", SOSP 2023). Plans may be made ahead of results: a token under way counts as known.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common_platform.errors import RequestError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup
from servekit.core.kv_manager import Hit, KVManager
from servekit.core.plan import BlockAppend, RowStart, StepPlan, StepResult, TokenLogprob
from servekit.core.policies import POLICIES, Policy
from servekit.core.request import HELD, DecodedTokens, FinishReason, Request, RequestState, RequestUpdate, Update
from servekit.core.stats import SchedulerStats
from servekit.core.stop import check_stop

Row = tuple[Request, int, int, bool, list[int]]  # first token in this step, how many, whether it samples, drafts
RUNNING = RequestState.RUNNING


@dataclass(slots=True)
class Draft:
    """A step while it is being planned."""

    tokens_left: int
    decodes: list[Request] = field(default_factory=list)  # they compute a token and sample one, nothing else
    rows: list[Row] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)
    appends: list[BlockAppend] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """The requests of one engine, from ``add`` to their last update.

    Args:
        config: budgets and policy.
        cache: size and sharing of the blocks.
        groups: the KV groups of the model.
        clock: seconds, monotonic; deadlines are measured by it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        groups: Sequence[KVGroup],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.kv = KVManager(cache, groups)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self._policy: Policy = POLICIES[config.policy]()
        self._served = self._policy.served if self._policy.counts_service else None
        self._keeps_all = all(group.kind == "full" for group in groups)
        self._clock = clock
        self._numbers = itertools.count()
        self._steps = itertools.count()
        self._free_slots = list(range(config.max_num_seqs))
        self._ended_slots: list[int] = []
        self._forks: dict[str, list[Request]] = {}  # parent's id -> requests that wait for its prompt
        self._deadlines: list[tuple[float, int, Request]] = []
        self._under_way: dict[int, tuple[list[Request], list[Row]]] = {}  # step -> its decodes and its other rows
        self._outbox: list[Update] = []
        self._stats = SchedulerStats()

    # --- the door ---

    def add(self, request: Request) -> None:
        """Queue ``request``.

        Raises:
            RequestError: its id is taken, its prompt is empty or longer than the context, or the cache could not
                hold it even alone.
        """
        self._check(request)
        request.order = next(self._numbers)
        request.max_total = min(request.max_total, self.config.max_model_len)
        if request.sampling.max_tokens is None:
            request.max_total = self.config.max_model_len
        self.requests[request.id] = request
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.order, request))
        if request.state is RequestState.WAITING_FORK:
            self._wait_for_sibling(request)
        elif request.state is RequestState.WAITING:
            self._policy.push(request)

    def _check(self, request: Request) -> None:
        limit = self.config.max_model_len
        if request.id in self.requests:
            raise RequestError("request_id", request.id, "an id that is not in use", code="conflict")
        if request.num_prompt == 0:
            raise RequestError("prompt", "no tokens", "at least 1 token", code="empty_prompt")
        asked = request.sampling.max_tokens
        if request.num_prompt + (0 if asked == 0 else 1) > limit:
            message = (
                f"prompt: got {request.num_prompt} tokens; allowed 1..{limit - 1}, so that one more fits the context "
                f"of {limit}; change with --max-model-len"
            )
            raise RequestError("prompt", request.num_prompt, code="context_length_exceeded", message=message)
        longest = limit if asked is None else min(request.num_prompt + asked, limit)
        if not self.kv.can_ever_hold(longest, self.config.max_num_batched_tokens):
            blocks, size = self.kv.pools[0].num_blocks - 1, self.kv.block_size
            message = (
                f"prompt and max_tokens: got {longest} tokens; the cache holds {blocks * size} ({blocks} blocks of "
                f"{size}); shorten them or change with --kv-cache-memory-bytes"
            )
            raise RequestError("max_tokens", longest, code="context_length_exceeded", message=message)

    def ready(self, request_id: str) -> bool:
        """What ``request_id`` was held for is there; False where the request has gone meanwhile."""
        request = self.requests.get(request_id)
        if request is None or request.state not in HELD:
            return False
        if request.state is not RequestState.WAITING_FORK and self._sibling_computes_prompt(request):
            request.move_to(RequestState.WAITING_FORK)
            self._forks.setdefault(request.fork_of or "", []).append(request)
            return True
        request.move_to(RequestState.WAITING)
        request.happened("ready", self._clock())
        self._policy.push(request)
        return True

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, *, error: str | None = None) -> bool:
        """End ``request_id`` from any state; False where it is not here (any more)."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._finish(request, reason, error=error)
        return True

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; running requests go on undisturbed."""
        self.kv.forget_all()
        return True

    def take_updates(self) -> list[Update]:
        """All news since the last call."""
        updates, self._outbox = self._outbox, []
        return updates

    @property
    def has_work(self) -> bool:
        """Whether any request is here that a step could advance, now or later."""
        return bool(self.requests)

    @property
    def next_deadline(self) -> float | None:
        """When ``plan_step`` must be called at the latest, on the scheduler's clock."""
        while self._deadlines and self._deadlines[0][2].is_finished:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def stats(self) -> SchedulerStats:
        """A snapshot of counts; the counters run from the start."""
        self._stats.num_running = len(self.running)
        self._stats.num_waiting = len(self._policy)
        self._stats.num_held = len(self.requests) - len(self.running) - len(self._policy)
        self._stats.kv_usage = self.kv.usage
        return self._stats.copy()

    # --- one step ---

    def plan_step(self, *, spent_tokens: int = 0) -> StepPlan:
        """Spend one step's token budget: running requests first, then waiting ones.

        Args:
            spent_tokens: what rows that are not in ``running`` take of the budget, see ``catch_up``.
        """
        self._expire()
        draft = Draft(tokens_left=self.config.max_num_batched_tokens - spent_tokens)
        self._continue_running(draft)
        if not draft.preempted:  # blocks are short: finish what we have first
            self._admit_waiting(draft)
        return self._seal(draft)

    def _continue_running(self, draft: Draft) -> None:
        order = self._policy.in_order(self.running)
        decodes, served = draft.decodes, self._served
        for request in order:  # it loses victims at its end meanwhile
            if not draft.tokens_left:
                return
            known = request.num_known
            if request.num_computed == known - 1 and (
                known <= request.decodes_until or (known <= request.grows_until and self._add_block(request, draft))
            ):
                request.num_computed = known  # the common case, most of a step's time: no call is made for it
                request.num_known = known + 1
                decodes.append(request)
                draft.tokens_left -= 1
                if served:
                    served(request, 1)
            elif not self._continue(request, order, draft):
                return

    def _add_block(self, request: Request, draft: Draft) -> bool:
        """Another block for a row that does nothing but decode; False where somebody has to give way first."""
        appends = self.kv.grow_by_one(request)
        if appends is None:
            return False
        draft.appends += appends
        known = request.decodes_until + self.kv.block_size
        request.decodes_until = known if known < request.grows_until else request.grows_until
        return True

    def _continue(self, request: Request, order: list[Request], draft: Draft) -> bool:
        """Whatever ``request`` needs next; False where it had to give way."""
        if self._has_all_its_tokens(request) or request.num_uncomputed == 0:
            return True
        drafts = self._drafts_of(request, draft)
        num_tokens = min(request.num_uncomputed + len(drafts), self._chunk(draft))
        appends = self._grow(request, num_tokens, order, draft)
        if appends is None:
            return False
        draft.appends.extend(appends)
        self._plan_row(draft, request, num_tokens, drafts)
        return True

    def _grow(self, request: Request, num_tokens: int, order: list[Request], draft: Draft) -> list[BlockAppend] | None:
        """Blocks for the next ``num_tokens``; who comes last gives way, None where that is ``request`` itself."""
        while True:
            appends = self.kv.grow(request, request.num_computed + num_tokens)
            if appends is not None:
                return appends
            victim = order.pop()
            self._preempt(victim, draft)
            if victim is request:
                return None

    def _admit_waiting(self, draft: Draft) -> None:
        while draft.tokens_left and self._free_slots:
            request = self._policy.peek()
            if request is None or self._is_under_way(request):
                return
            if not self._admit(request, self._find_hit(request), draft):
                return  # first come, first served: a short prompt does not overtake

    def _is_under_way(self, request: Request) -> bool:
        """Whether it was preempted, and a token of it is still being computed."""
        if request.state is not RequestState.PREEMPTED:
            return False
        steps = self._under_way.values()
        return any(request in decodes or any(row[0] is request for row in rows) for decodes, rows in steps)

    def _admit(self, request: Request, hit: Hit, draft: Draft) -> bool:
        num_wanted = request.num_known - hit.num_tokens
        num_tokens = min(num_wanted, self._chunk(draft))
        if num_tokens < num_wanted and not self.config.enable_chunked_prefill:
            return False
        copies = self.kv.admit(request, hit, hit.num_tokens + num_tokens)
        if copies is not None:
            self._start(request, hit, draft, copies)
            self._plan_row(draft, request, num_tokens, [])
            return True
        return bool(hit.partial_tokens) and self._admit(request, hit.without_partial(), draft)

    def _chunk(self, draft: Draft) -> int:
        threshold = self.config.long_prefill_token_threshold
        return min(draft.tokens_left, threshold) if threshold else draft.tokens_left

    def _has_all_its_tokens(self, request: Request) -> bool:
        """The last token that it may have is sampled already, or under way."""
        return request.num_known >= request.max_total and request.num_known > request.num_prompt

    def _drafts_of(self, request: Request, draft: Draft) -> list[int]:
        """Speculative tokens to verify, as far as limits let them all be accepted, one more sampled after them."""
        drafts, request.drafts = request.drafts, []
        room = min(request.max_total - request.num_known - 1, self._chunk(draft) - request.num_uncomputed)
        return drafts[: max(room, 0)]

    def _find_hit(self, request: Request) -> Hit:
        source = self.requests.get(request.fork_of) if request.fork_of else None
        if source is not None and source.state is RequestState.RUNNING and request.num_output == 0:
            shared = self.kv.fork_hit(source, request)
            if shared is not None:
                return shared
        return self.kv.find_hit(request)

    def _start(self, request: Request, hit: Hit, draft: Draft, copies: list[tuple[int, int, int]]) -> None:
        if self._policy.pop() is not request:
            raise RuntimeError("the queue's head changed while it was admitted")
        request.move_to(RequestState.RUNNING)
        request.slot = heapq.heappop(self._free_slots)
        request.num_computed = request.num_confirmed = hit.num_tokens
        request.prompt_logprobs = []
        self.running.append(request)
        if request.num_cached < 0:
            request.num_cached = hit.num_tokens
            request.happened("scheduled", self._clock())
            self._stats.prefix_queried_tokens += request.num_prompt
            self._stats.prefix_hit_tokens += hit.num_tokens
            self._stats.offload_hit_tokens += len(hit.offloaded) * self.kv.block_size
        else:
            request.happened("resumed", self._clock())
        draft.copies.extend(copies)
        draft.starts.append(
            RowStart(
                slot=request.slot,
                request_id=request.id,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt,
                num_computed_tokens=hit.num_tokens,
                blocks=[list(table) for table in request.tables],
                sampling=request.sampling,
                eos_token_ids=request.eos_token_ids,
                adapter_id=request.adapter_id,
                pooling=request.pooling,
                embeds=request.embeds,
            )
        )

    def _plan_row(self, draft: Draft, request: Request, num_tokens: int, drafts: list[int]) -> None:
        start = request.num_computed
        samples = start + num_tokens - len(drafts) == request.num_known and request.num_known < request.max_total
        draft.rows.append((request, start, num_tokens, samples, drafts))
        draft.tokens_left -= num_tokens
        request.num_computed += num_tokens
        request.num_known += samples
        self._look_ahead(request)
        if self._served:
            self._served(request, num_tokens)

    def _look_ahead(self, request: Request) -> None:
        """Find out up to how many known tokens nothing but the next one, and now and then a block, is to be planned."""
        request.grows_until = request.decodes_until = 0
        if request.num_computed >= request.num_prompt and self._keeps_all:
            room = min(len(table) for table in request.tables) * self.kv.block_size
            request.grows_until = request.max_total - 1
            request.decodes_until = min(room, request.grows_until)

    def _preempt(self, request: Request, draft: Draft) -> None:
        """Take slot and blocks back; what it had is computed again later, as far as it is not cached."""
        self._leave_batch(request)
        request.num_computed = request.num_confirmed = 0
        request.drafts = []
        request.move_to(RequestState.PREEMPTED)
        request.happened("preempted", self._clock())
        self._policy.push(request)
        self._stats.preemptions += 1
        draft.preempted = True

    def _leave_batch(self, request: Request) -> None:
        self.kv.release(request)
        self.running.remove(request)
        self._ended_slots.append(request.slot)
        heapq.heappush(self._free_slots, request.slot)
        request.slot = -1
        request.decodes_until = request.grows_until = 0

    def _seal(self, draft: Draft) -> StepPlan:
        ended, self._ended_slots = self._ended_slots, []
        saves, loads = self.kv.tier.take_transfers() if self.kv.tier else ([], [])
        plan = StepPlan(
            step=next(self._steps),
            slots=[request.slot for request in draft.decodes] + [row[0].slot for row in draft.rows],
            num_tokens=[1] * len(draft.decodes) + [row[2] for row in draft.rows],
            samples=[True] * len(draft.decodes) + [row[3] for row in draft.rows],
            starts=draft.starts,
            ends=ended,
            appends=draft.appends,
            copies=draft.copies,
            drafts={row[0].slot: row[4] for row in draft.rows if row[4]},
            saves=saves,
            loads=loads,
        )
        if plan.slots:
            self._under_way[plan.step] = (draft.decodes, draft.rows)
            self._stats.steps += 1
            self._stats.computed_tokens += self.config.max_num_batched_tokens - draft.tokens_left
        return plan

    def catch_up(self, request: Request, token_ids: Sequence[int]) -> None:
        """Bring ``request`` to where one step for each of ``token_ids`` would have: plain decodes, none its last.

        For a driver that takes rows out of ``running`` while all that happens to them is known, as the simulator does.
        It grows their block tables meanwhile, and leaves the budget of ``plan_step`` as they would.
        """
        before, count = request.num_confirmed, len(token_ids)
        request.token_ids.extend(token_ids)
        request.num_known += count
        request.num_computed += count
        request.num_confirmed += count
        self.kv.share_computed(request, before)
        self._look_ahead(request)
        self._stats.generated_tokens += count
        if self._served:
            self._served(request, count)

    def rank(self, request: Request) -> Any:
        """Sorts ascending: the first runs first, the last gives way first."""
        return self._policy.rank(request)

    # --- its result ---

    def finish_step(self, plan: StepPlan, result: StepResult) -> None:
        """Take in what the step ``plan`` computed. Results of requests that have gone meanwhile are dropped."""
        decodes, rows = self._under_way.pop(plan.step, ([], []))
        if result.sampled:
            self._take_decoded(decodes, result.sampled)
            self._take_sampled(rows, result.sampled[len(decodes) :])
            return
        tokens = iter(result.tokens)
        for slot, row in zip(plan.slots, [*map(_decode_row, decodes), *rows], strict=True):
            new = next(tokens) if row[3] else []
            request = row[0]
            if request.is_finished:
                continue
            if slot in result.errors:
                self._finish(request, FinishReason.ERROR, error=result.errors[slot])
                continue
            self._confirm(row, len(new))
            self._collect_prompt_logprobs(row, result.prompt_logprobs.get(slot, []))
            request.drafts = list(result.proposals.get(slot, []))
            if request.drafts:
                request.decodes_until = request.grows_until = 0
            request.pooled = result.pooled.get(slot, [])
            self._advance(row, new, result.logprobs.get(slot, []))
            if row[4]:
                self._confirm_accepted(row, len(new))

    def _take_decoded(self, decodes: list[Request], tokens: list[int]) -> None:
        """One token each, of which nothing else is told; mostly not the last one."""
        size, share = self.kv.block_size, self.kv.share_computed
        told_ids: list[str] = []
        told_tokens: list[int] = []
        num_others = 0
        for request, token in zip(decodes, tokens, strict=False):
            confirmed = request.num_confirmed + 1
            if confirmed < request.grows_until and token not in request.stop_ids:
                request.num_confirmed = confirmed  # the common case, it runs and goes on: no call is made for it
                if not confirmed % size:
                    share(request, confirmed - 1)
                request.token_ids.append(token)
                if not request.final_only:
                    told_ids.append(request.id)
                    told_tokens.append(token)
                continue
            num_others += 1
            if not request.is_finished:
                self._take_token(_decode_row(request), [token])
        self._stats.generated_tokens += len(decodes) - num_others
        if told_ids:
            self._outbox.append(DecodedTokens(told_ids, told_tokens))

    def _take_sampled(self, rows: list[Row], sampled: list[int]) -> None:
        """A step of which nothing is told but one token for each row that samples."""
        tokens = iter(sampled)
        for row in rows:
            new = [next(tokens)] if row[3] else []
            if not row[0].is_finished:
                self._take_token(row, new)

    def _take_token(self, row: Row, new: list[int]) -> None:
        self._confirm(row, len(new))
        self._advance(row, new, [])

    def _confirm(self, row: Row, num_new: int) -> None:
        """The step's tokens are computed; rejected drafts are taken back."""
        request, start, num_tokens, _, drafts = row
        rejected = len(drafts) + 1 - num_new if drafts else 0
        if drafts:
            request.num_computed -= rejected
            request.num_known += num_new - 1
            self._stats.drafted_tokens += len(drafts)
            self._stats.accepted_tokens += num_new - 1
        if request.state is not RUNNING:
            return
        before = request.num_confirmed
        request.num_confirmed = min(start + num_tokens - rejected, request.num_tokens)
        self.kv.share_computed(request, before)
        if before < request.num_prompt <= request.num_confirmed:
            self._release_siblings(request.id)

    def _confirm_accepted(self, row: Row, num_new: int) -> None:
        """Accepted drafts are tokens of the request by now, and were computed: who counted them late would end late."""
        request, start, num_tokens, _, drafts = row
        if request.state is RUNNING:
            before = request.num_confirmed
            request.num_confirmed = min(start + num_tokens - (len(drafts) + 1 - num_new), request.num_tokens - 1)
            self.kv.share_computed(request, before)

    def _collect_prompt_logprobs(self, row: Row, logprobs: list[TokenLogprob]) -> None:
        request = row[0]
        wanted = request.wants_prompt_logprobs and request.num_output == 0  # sent with the first token
        if wanted and len(request.prompt_logprobs) == row[1]:
            request.prompt_logprobs.extend(logprobs)

    def _advance(self, row: Row, new: list[int], logprobs: list[TokenLogprob]) -> None:
        request, kept, ended = row[0], 0, None
        first = bool(new) and request.num_output == 0
        if first:
            request.happened("first_token", self._clock())
        for token in new:
            request.token_ids.append(token)
            kept += 1
            ended = check_stop(request)
            if ended:
                break
        if not row[3] and request.max_total == request.num_prompt == request.num_confirmed:
            ended = (FinishReason.LENGTH, None)  # only the prompt was asked for
        self._stats.generated_tokens += kept
        if kept or ended:
            self._send(request, new[:kept], logprobs[:kept], ended)

    def _send(
        self,
        request: Request,
        new: list[int],
        logprobs: list[TokenLogprob],
        ended: tuple[FinishReason, int | None] | None,
    ) -> None:
        if request.final_only and not ended:
            return
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        if ended:
            self._finish(request, *ended, new=new, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
            return
        self._outbox.append(
            RequestUpdate(
                request.id,
                new,
                logprobs,
                prompt_logprobs,
                num_cached_tokens=max(request.num_cached, 0),
                events=request.take_events(),
            )
        )

    # --- the end ---

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | None = None,
        *,
        error: str | None = None,
        new: Sequence[int] = (),
        logprobs: Sequence[TokenLogprob] = (),
        prompt_logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        """The one way out, from every state: slot, blocks and queue places come back, and the last update goes."""
        if request.state is RequestState.RUNNING:
            self._leave_batch(request)
        else:
            self._policy.discard(request)
        request.move_to(RequestState.FINISHED)
        request.finish_reason = reason
        request.happened("finished", self._clock())
        del self.requests[request.id]
        self._forget_fork(request)
        self._release_siblings(request.id)
        self._stats.count_finished(reason.value)
        tokens = request.token_ids[request.num_prompt :] if request.final_only else list(new)
        self._outbox.append(
            RequestUpdate(
                request.id,
                tokens,
                list(logprobs),
                list(prompt_logprobs or request.prompt_logprobs),
                finish_reason=reason.value,
                stop_reason=stop_reason,
                error=error,
                pooled=request.pooled,
                num_cached_tokens=max(request.num_cached, 0),
                events=request.take_events(),
            )
        )

    def _expire(self) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if not request.is_finished:
                self._finish(request, FinishReason.TIMEOUT)

    # --- n > 1: siblings share the prompt that the first one computes ---

    def _sibling_computes_prompt(self, request: Request) -> bool:
        source = self.requests.get(request.fork_of or "")
        return source is not None and source.num_confirmed < source.num_prompt

    def _wait_for_sibling(self, request: Request) -> None:
        if self._sibling_computes_prompt(request):
            self._forks.setdefault(request.fork_of or "", []).append(request)
        else:
            self.ready(request.id)

    def _release_siblings(self, request_id: str) -> None:
        for sibling in self._forks.pop(request_id, []):
            self.ready(sibling.id)

    def _forget_fork(self, request: Request) -> None:
        waiting = self._forks.get(request.fork_of or "")
        if waiting and request in waiting:
            waiting.remove(request)


def _decode_row(request: Request) -> Row:
    """A decode as a row: steps end in order, so its token is the first that is not confirmed."""
    return request, request.num_confirmed, 1, True, []
