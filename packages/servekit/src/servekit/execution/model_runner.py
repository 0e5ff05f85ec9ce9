"""One rank's share of a step: apply the plan, run the model, sample, and say what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.plan import RowStart, StepPlan, StepResult, TokenLogprob
from servekit.execution.device_memory import TorchMemory
from servekit.execution.graphs import GraphedForward, GraphSizes, Recorder
from servekit.execution.input_batch import InputBatch, StepArrays
from servekit.execution.logits_processors import Factory
from servekit.execution.logprobs import token_logprobs
from servekit.execution.offload import OffloadStore
from servekit.execution.pooling import Pool
from servekit.execution.proposer import Proposer
from servekit.execution.sampler import SampleOutput, Sampler, chosen
from servekit.execution.sampler_row import Grammar
from servekit.execution.warm_up import null_step, steps
from servekit.kernels.kv_write import copy_blocks
from servekit.kernels.paged_attention.metadata import to_device
from servekit.layers.attention import StepInputs
from servekit.layers.kernels import Kernels
from servekit.models.registry import CausalModel, GreedyModel
from servekit.sampling.parameters import SamplingParams, StructuredOutput

GrammarOf = Callable[[StructuredOutput], Grammar]
DEFAULT_KERNELS = Kernels()
NO_NUMBER = "no token can follow: the model's output is not a number"
NOTHING = torch.empty(0)
MAX_FORCED = 32  # tokens of a grammar's forced text that one step verifies
PROMPT_LOGPROB_ROWS = 256  # positions whose logits exist at a time


@dataclass(slots=True)
class Launched:
    """A step that the device was given: its result is there already, or the tokens are under way to the host.

    ``arrived`` waits until they are; ``slots`` are those that they are for.
    """

    done: StepResult | None = None
    step: int = 0
    slots: list[int] = field(default_factory=list)
    tokens: Tensor = NOTHING
    highest: Tensor = NOTHING
    arrived: Callable[[], None] = field(default=lambda: None)

    def result(self) -> StepResult:
        """Wait for the device where that is needed. Any thread may."""
        if self.done is not None:
            return self.done
        self.arrived()
        tokens, finite = self.tokens.tolist(), torch.isfinite(self.highest).tolist()
        if all(finite):
            return StepResult(self.step, [], sampled=tokens)
        errors = {slot: NO_NUMBER for slot, is_number in zip(self.slots, finite, strict=True) if not is_number}
        kept = [[token] if is_number else [] for token, is_number in zip(tokens, finite, strict=True)]
        return StepResult(self.step, kept, errors=errors)


class ModelRunner:
    """The model, its KV cache and the rows of the batch.

    Args:
        model: loaded.
        cache: how many blocks, of what size.
        scheduler: how many rows, of what length.
        kv_dtype: of keys and values.
        grammar_of: makes the state of a structured output.
        proposer: drafts the tokens of the next step; its cache is bound.
        offload_folder: of the offload tier; None keeps it in host memory.
        kernels: that the model was made with.
        recorder: records steps as graphs; None where the device cannot, or should not.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        kv_dtype: torch.dtype,
        device: torch.device,
        grammar_of: GrammarOf | None = None,
        proposer: Proposer | None = None,
        offload_folder: str | None = None,
        kernels: Kernels = DEFAULT_KERNELS,
        recorder: Recorder | None = None,
        processors: Sequence[Factory] = (),
    ) -> None:
        self.model = model
        self._greedy = model if isinstance(model, GreedyModel) else None
        self._proposer = proposer
        self._grammar_of = grammar_of
        self.device = device
        self.batch = InputBatch(
            scheduler.max_num_seqs,
            scheduler.max_model_len,
            cache.block_size,
            model.kv_groups,
            device,
            kernels.build_metadata,
        )
        self.sampler = Sampler(
            model.vocab_size, scheduler.max_num_seqs, device, kernels.sample, processors, kernels.logits
        )
        self._prompt_logprobs: dict[int, int] = {}  # slot -> how many of the most likely
        self._pools: dict[int, Pool] = {}
        for attention in model.attentions:
            attention.bind(cache.num_blocks, cache.block_size, kv_dtype, device)
        self._offload: OffloadStore | None = None
        if cache.num_offload_blocks:
            attentions = [*model.attentions, *(proposer.attentions if proposer else [])]
            self._offload = OffloadStore(attentions, cache.num_offload_blocks, offload_folder)
        self._max_model_len = scheduler.max_model_len
        self._max_tokens = scheduler.max_num_batched_tokens
        self.graph_bytes = 0  # of the device's memory, that recorded steps hold
        self.forward: Callable[[StepInputs], Tensor] = model.forward
        if recorder is not None:
            self.forward = self._recorded(recorder, cache, scheduler)

    @torch.inference_mode()
    def _recorded(self, recorder: Recorder, cache: CacheConfig, scheduler: SchedulerConfig) -> GraphedForward:
        graphed = GraphedForward(
            self.model.forward,
            recorder,
            GraphSizes.up_to(scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
            self.model.kv_groups,
            max_model_len=scheduler.max_model_len,
            block_size=cache.block_size,
            device=self.device,
        )
        memory = TorchMemory(self.device) if self.device.type == "cuda" else None
        before = memory.free() if memory else 0
        graphed.record_all()
        self.graph_bytes = before - memory.free() if memory else 0
        return graphed

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Launch every kernel that a step may launch, so that no request waits until one is compiled."""
        models = [self.model, *(self._proposer.models if self._proposer else [])]
        for starts, counts in steps(self._max_tokens, self._max_model_len):
            for model in models:
                step = null_step(model.kv_groups, starts, counts, self.batch.block_size, self.batch.build, self.device)
                model.logits(model.forward(step)[-1:])
        self.sampler.warm_up()

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry ``plan`` out, in the order that ``servekit.core.plan`` states."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """As ``execute``, and come back as soon as the device has its work where no one has to look at the tokens."""
        self._apply(plan)
        if not plan.slots:
            return Launched(StepResult(plan.step, []))
        step = self.batch.arrays(plan)
        inputs = self.batch.inputs(step)
        if self._greedy and self.sampler.is_greedy and any(plan.samples) and not plan.drafts:
            return Launched(self._greedy_step(self._greedy, plan, step, inputs))
        hidden = self.forward(inputs)
        if self._needs_no_look(plan, step):
            return self._draw_unseen(plan, step, hidden)
        return Launched(self._looked_at(plan, step, inputs, hidden))

    def _needs_no_look(self, plan: StepPlan, step: StepArrays) -> bool:
        """Whether tokens can stay on the device until they are told: all rows draw freely, and nothing is drafted."""
        if self._proposer or plan.drafts or self._prompt_logprobs or self._pools or not any(plan.samples):
            return False
        slots = step.slots if all(plan.samples) else step.slots[np.flatnonzero(plan.samples)]
        return self.sampler.is_plain(slots.tolist())

    def _draw_unseen(self, plan: StepPlan, step: StepArrays, hidden: Tensor) -> Launched:
        rows = slice(None) if all(plan.samples) else np.flatnonzero(plan.samples)
        slots = step.slots[rows]
        self.batch.num_computed[step.slots] += step.counts
        tokens, highest = self.sampler.draw_unseen(self._logits(step.lasts[rows], hidden), slots.tolist())
        self.batch.add_unseen(slots, tokens)
        if self.device.type != "cuda":
            return Launched(step=plan.step, slots=slots.tolist(), tokens=tokens, highest=highest)
        tokens, highest = (part.to("cpu", non_blocking=True) for part in (tokens, highest))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Launched(step=plan.step, slots=slots.tolist(), tokens=tokens, highest=highest, arrived=event.synchronize)

    def _greedy_step(self, model: GreedyModel, plan: StepPlan, step: StepArrays, inputs: StepInputs) -> StepResult:
        """Where all rows want their most likely tokens: those come out of the model, most often with all there is."""
        rows = None if all(plan.samples) else np.flatnonzero(plan.samples)
        hidden, likely = model.forward_greedy(inputs, step.lasts if rows is None else step.lasts[rows])
        output = chosen(likely.highest, likely.ids) if likely else None
        if output is None or self._proposer or self._prompt_logprobs or self._pools:
            return self._looked_at(plan, step, inputs, hidden, output)
        slots = step.slots
        if rows is not None:
            self.batch.num_computed[slots] += step.counts
            slots = slots[rows]
        self.batch.add_sampled(slots, output.token_ids)
        return StepResult(plan.step, [], sampled=output.token_ids)

    def _looked_at(
        self, plan: StepPlan, step: StepArrays, inputs: StepInputs, hidden: Tensor, output: SampleOutput | None = None
    ) -> StepResult:
        """``output``: of the rows that sample, where it is known."""
        if self._proposer:
            self._proposer.computed(inputs)
        prompt_logprobs = self._prompt_logprobs_of(step, hidden)
        pooled = self._pooled_of(step, hidden)
        if not all(plan.samples):  # a sampled token says itself that all before it is computed
            self.batch.num_computed[step.slots] += step.counts
        result = self._sample(plan, step, hidden, prompt_logprobs, output)
        if pooled:
            tokens = result.tokens or [[token] for token in result.sampled]
            return msgspec.structs.replace(result, tokens=tokens, sampled=[], pooled=pooled)
        return result

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.ends:
            self.batch.end(slot)
            self.sampler.remove_row(slot)
            self._prompt_logprobs.pop(slot, None)
            self._pools.pop(slot, None)
        if self._offload:
            self._offload.move(plan.saves, plan.loads)
        self._copy(plan.copies)
        if self._proposer:
            self._proposer.copy(plan.copies)
        for row in plan.starts:
            self.batch.start(row)
            prompt, output = row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :]
            if row.embeds is not None:
                prompt = []  # no tokens that a penalty could be for
            spec = row.sampling.structured_outputs
            grammar = self._grammar_of(spec) if spec and self._grammar_of else None
            self.sampler.add_row(row.slot, row.sampling, prompt, output, row.eos_token_ids, grammar)
            if row.sampling.prompt_logprobs is not None:
                self._prompt_logprobs[row.slot] = row.sampling.prompt_logprobs
            if row.pooling:
                self._pools[row.slot] = Pool(row.pooling, row.num_prompt_tokens)
        if plan.appends:
            self.batch.append(plan.appends)
        for slot, drafts in plan.drafts.items():
            self.batch.extend(slot, drafts)

    def _copy(self, copies: list[tuple[int, int, int]]) -> None:
        for group in {group for group, _, _ in copies}:
            pairs = to_device(np.asarray([pair for g, *pair in copies if g == group], np.int64), self.device)
            for attention in self.model.attentions:
                if attention.group == group:
                    for cache in attention.caches:
                        copy_blocks(cache, pairs[:, 0], pairs[:, 1])

    def _sample(
        self,
        plan: StepPlan,
        step: StepArrays,
        hidden: Tensor,
        prompt_logprobs: dict[int, list[TokenLogprob]],
        output: SampleOutput | None,
    ) -> StepResult:
        if not any(plan.samples):
            return StepResult(plan.step, [], prompt_logprobs=prompt_logprobs)
        rows, slots, wanted = step.lasts, step.slots, plan.slots
        if not all(plan.samples):
            sampled = np.flatnonzero(plan.samples)
            rows, slots, wanted = rows[sampled], slots[sampled], slots[sampled].tolist()
        if plan.drafts:
            return self._verify(plan, wanted, rows, hidden, prompt_logprobs)
        if output is None:
            output = self.sampler.sample(self._logits(rows, hidden), wanted)
        known = [max(token, 0) for token in output.token_ids] if output.errors else output.token_ids
        self.batch.add_sampled(slots, known)
        proposals = self._proposals(wanted, output.errors)
        if not (output.errors or output.logprobs or prompt_logprobs or proposals):
            return StepResult(plan.step, [], sampled=output.token_ids)
        return StepResult(
            plan.step,
            [[token] if token >= 0 else [] for token in output.token_ids],
            logprobs={slot: [entry] for slot, entry in output.logprobs.items()},
            prompt_logprobs=prompt_logprobs,
            errors=output.errors,
            proposals=proposals,
        )

    def _logits(self, places: NDArray[np.int64], hidden: Tensor) -> Tensor:
        if len(places) != len(hidden):
            hidden = hidden.index_select(0, to_device(places, self.device))
        return self.model.logits(hidden)

    def _verify(
        self,
        plan: StepPlan,
        slots: list[int],
        lasts: NDArray[np.int64],
        hidden: Tensor,
        prompt_logprobs: dict[int, list[TokenLogprob]],
    ) -> StepResult:
        """As ``_sample``, with logits at each row's last token and at the drafts before it."""
        drafts = [plan.drafts.get(slot, []) for slot in slots]
        counts = np.asarray([len(row) + 1 for row in drafts])
        firsts = np.cumsum(counts) - counts
        places = np.repeat(lasts + 1 - counts - firsts, counts) + np.arange(counts.sum())
        logits = self._logits(places, hidden)
        tokens, logprobs, errors = self._verified(logits, firsts.tolist(), slots, drafts)
        for slot, row, new in zip(slots, drafts, tokens, strict=True):
            self.batch.replace_end(slot, len(row), new or [0])
        return StepResult(
            plan.step,
            tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            proposals=self._proposals(slots, errors),
        )

    def _verified(
        self, logits: Tensor, firsts: list[int], slots: list[int], drafts: list[list[int]]
    ) -> tuple[list[list[int]], dict[int, list[TokenLogprob]], dict[int, str]]:
        """Each row's tokens: drafts as long as they are what is sampled, and the token sampled after them."""
        tokens: list[list[int]] = [[] for _ in slots]
        logprobs: dict[int, list[TokenLogprob]] = {}
        errors: dict[int, str] = {}
        active = list(range(len(slots)))
        position = 0
        while active:
            places = [firsts[row] + position for row in active]
            chosen = logits if len(places) == len(logits) else logits[places]
            output = self.sampler.sample(chosen, [slots[row] for row in active])
            errors |= output.errors
            for slot, entry in output.logprobs.items():
                logprobs.setdefault(slot, []).append(entry)
            going_on = []
            for row, token in zip(active, output.token_ids, strict=True):
                if slots[row] in output.errors:
                    tokens[row] = []
                    continue
                tokens[row].append(token)
                if position < len(drafts[row]) and drafts[row][position] == token:
                    going_on.append(row)
            active, position = going_on, position + 1
        return tokens, logprobs, errors

    def _proposals(self, slots: Sequence[int], errors: dict[int, str]) -> dict[int, list[int]]:
        """What a grammar forces comes first (jump-ahead: Zheng et al., "SGLang", 2024), then what is likely."""
        if not self._proposer and not self.sampler.has_grammars:
            return {}
        going_on = [slot for slot in slots if slot not in errors]
        found = {slot: self.sampler.forced(slot)[:MAX_FORCED] for slot in going_on}
        if self._proposer:
            free = [slot for slot in going_on if not found[slot]]
            found |= dict(zip(free, self._proposer.propose(self.batch, free), strict=True))
        return {slot: drafts for slot, drafts in found.items() if drafts}

    def _pooled_of(self, step: StepArrays, hidden: Tensor) -> dict[int, list[Any]]:
        if not self._pools:
            return {}
        found: dict[int, list[Any]] = {}
        for row, slot in enumerate(step.slots.tolist()):
            if slot in self._pools:
                last = int(step.lasts[row]) + 1
                states = hidden[last - int(step.counts[row]) : last]
                found[slot] = self._pools[slot].add(states, int(step.starts[row]))
        return {slot: pooled for slot, pooled in found.items() if pooled}

    def _prompt_logprobs_of(self, step: StepArrays, hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        if not self._prompt_logprobs:
            return {}
        found: dict[int, list[TokenLogprob]] = {}
        for row, slot in enumerate(step.slots.tolist()):
            targets = self.batch.following(step, row).tolist() if slot in self._prompt_logprobs else []
            if targets:
                first = int(step.lasts[row] + 1 - step.counts[row])
                states = hidden[first : first + len(targets)]
                found[slot] = self._entries(states, targets, self._prompt_logprobs[slot])
        return found

    def _entries(self, states: Tensor, targets: list[int], top: int) -> list[TokenLogprob]:
        entries: list[TokenLogprob] = []
        for first in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            part = slice(first, first + PROMPT_LOGPROB_ROWS)
            entries += token_logprobs(self.model.logits(states[part]), targets[part], [top] * len(targets[part]))
        return entries


@torch.inference_mode()
def largest_step(
    model: CausalModel, num_tokens: int, num_seqs: int, dtype: torch.dtype, device: torch.device, kernels: Kernels
) -> None:
    """Compute as much as a step ever does: so many tokens of one row, and so many rows of logits; nothing is kept."""
    size = 16
    for attention in model.attentions:
        attention.bind(2, size, dtype, device)
    hidden = model.forward(null_step(model.kv_groups, [0], [num_tokens], size, kernels.build_metadata, device))
    picked = hidden[torch.zeros(num_seqs, dtype=torch.int64, device=device)]
    torch.log_softmax(model.logits(picked), dim=-1)
    for attention in model.attentions:
        attention.release()


@torch.inference_mode()
def score(
    model: CausalModel,
    token_ids: list[int],
    block_size: int,
    device: torch.device,
    kv_dtype: torch.dtype = torch.float32,
) -> list[float]:
    """The logprob of each token after the first, by a cache that lives only for this call."""
    num_blocks = -(-len(token_ids) // block_size)
    for attention in model.attentions:
        attention.bind(num_blocks + 1, block_size, kv_dtype, device)
    batch = InputBatch(1, len(token_ids), block_size, model.kv_groups, device)
    blocks = [list(range(1, num_blocks + 1)) for _ in model.kv_groups]
    batch.start(RowStart(0, "probe", token_ids, len(token_ids), 0, blocks, SamplingParams(), []))
    step = batch.arrays(StepPlan(0, [0], [len(token_ids)], [False]))
    inputs: StepInputs = batch.inputs(step)
    logits = model.logits(model.forward(inputs)[:-1])
    targets = torch.tensor(token_ids[1:], device=device)
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].tolist()
