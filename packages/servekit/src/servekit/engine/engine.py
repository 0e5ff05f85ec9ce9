"""The engine: a scheduler, an executor, and the loop between them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from common_platform.artifact import Probe, check_probes
from common_platform.errors import ArtifactFormatError, ConfigError, RequestError, ResourceError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import ModelFacts
from servekit.core.plan import StepPlan
from servekit.core.request import FinishReason, Request, RequestState, RequestUpdate, Update
from servekit.core.scheduler import Scheduler
from servekit.core.stats import SchedulerStats
from servekit.engine.config import GIB, EngineConfig
from servekit.engine.devices import check_devices
from servekit.engine.grammars import Grammars
from servekit.engine.validate import EngineRequest
from servekit.execution.choices import ExecutorConfig
from servekit.execution.device_memory import DEFAULT_UTILIZATION
from servekit.execution.executor import InProcessExecutor, Outcome
from servekit.execution.host_memory import available_memory, resident_memory, total_memory
from servekit.kernels.choice import GPU
from servekit.sampling.parameters import SamplingParams

PROBE_TOLERANCE = {"float32": 2e-3}  # nats; trainer and server sum in another order
PROBE_TOLERANCE_LOW_PRECISION = 0.25
GRAMMAR_WAIT_S = 0.005  # for a grammar, when nothing else is to be done
CACHE_SHARE, CACHE_MOST = 0.4, 4 * GIB  # of the free memory, unless told otherwise


class EngineCore:
    """Loads a model, proves it, and serves requests step by step. Not thread-safe: one loop owns it.

    Raises:
        ArtifactError: the model folder is damaged, or is not the model it says it is.
        ConfigError: a setting does not fit the model or the memory.
        ResourceError: the machine has less than a setting asks for.
    """

    def __init__(self, config: EngineConfig) -> None:
        check_devices(config)
        executor = ExecutorConfig(
            dtype=config.dtype,
            device=config.device,
            num_threads=config.num_threads,
            max_model_len=config.max_model_len or 0,
            speculative=config.speculative_config,
            offload_folder=config.kv_offload_folder,
            deterministic=config.deterministic,
            kernels=config.kernels,
            enforce_eager=config.enforce_eager,
            kv_cache_dtype=config.kv_cache_dtype,
            quantization=config.quantization,
            logits_processors=tuple(config.logits_processors),
            allow_nonfinite=config.allow_nonfinite,
        )
        self.executor = InProcessExecutor(config.model, executor)
        self._prove(config)
        cache, max_model_len = self._size_cache(config)
        self.facts: ModelFacts = msgspec.structs.replace(self.executor.model_facts, max_model_len=max_model_len)
        plans_ahead = config.async_scheduling and config.speculative_config is None  # drafts come with a result
        scheduler = SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            enable_chunked_prefill=config.enable_chunked_prefill,
            policy=config.scheduling_policy,
            async_scheduling=plans_ahead,
        )
        self.cache = cache
        self.scheduler = Scheduler(scheduler, cache, self.executor.kv_groups)
        self._grammars = Grammars(config.model, self.facts, config.grammar_limits)
        self.executor.start(cache, scheduler, self._grammars.start)
        self._depth = 2 if plans_ahead else 1
        self._drafting: set[str] = set()  # sequences whose grammar may draft: planned when their last step is known
        self._under_way: deque[tuple[StepPlan, Outcome]] = deque()
        self.is_sleeping = False

    def _prove(self, config: EngineConfig) -> None:
        manifest = self.executor.folder.manifest
        if manifest is None:
            return
        tolerance = config.probe_tolerance
        if tolerance is None:
            tolerance = PROBE_TOLERANCE.get(self.executor.model_facts.dtype, PROBE_TOLERANCE_LOW_PRECISION)
        _check_form(manifest.probes, self.executor.model_facts.vocab_size)
        check_probes(manifest.probes, self.executor.score, tolerance=tolerance)

    def _size_cache(self, config: EngineConfig) -> tuple[CacheConfig, int]:
        """Blocks for the memory given, and the context that fits them."""
        wanted = self.executor.model_facts.max_model_len
        per_block = self.executor.bytes_per_block(config.block_size)
        memory = self._cache_memory(config)
        most = config.max_num_seqs * -(-wanted // config.block_size)  # more could not be used at once
        num_blocks = min(memory // per_block, most)
        room = num_blocks * config.block_size
        if room < (wanted if config.max_model_len else config.block_size):
            raise ConfigError(
                "kv_cache_memory_bytes",
                memory,
                f"{-(-wanted // config.block_size) * per_block} or more for max_model_len={wanted}",
                flag="--kv-cache-memory-bytes or --max-model-len",
            )
        cache = CacheConfig(
            num_blocks=num_blocks + 1,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            num_offload_blocks=self._num_offload_blocks(config, per_block),
        )
        return cache, min(wanted, room)

    def _cache_memory(self, config: EngineConfig) -> int:
        """Bytes for keys and values: as told, or what is left of the share once the weights are there."""
        if config.kv_cache_memory_bytes is not None:
            return config.kv_cache_memory_bytes
        if self.executor.platform.name in GPU:
            share = config.gpu_memory_utilization or DEFAULT_UTILIZATION
            return self.executor.profile(share, config.max_num_batched_tokens, config.max_num_seqs).for_cache
        free = available_memory()
        if config.gpu_memory_utilization is None:
            return min(int(free * CACHE_SHARE), CACHE_MOST)
        return max(0, min(free, int(total_memory() * config.gpu_memory_utilization) - resident_memory()))

    def _num_offload_blocks(self, config: EngineConfig, per_block: int) -> int:
        kinds = [group.kind for group in self.executor.kv_groups]
        if config.kv_offload_folder is None and config.kv_offload_bytes > available_memory():
            limit = f"at most {available_memory()}, which is free; or name a --kv-offload-folder"
            raise ConfigError("kv_offload_bytes", config.kv_offload_bytes, limit, flag="--kv-offload-bytes")
        if config.kv_offload_bytes and kinds != ["full"]:
            limit = "0 for a model whose layers do not all keep every token"
            raise ConfigError("kv_offload_bytes", config.kv_offload_bytes, limit, flag="--kv-offload-bytes")
        return config.kv_offload_bytes // per_block if config.enable_prefix_caching else 0

    def add(self, request: EngineRequest) -> None:
        """Queue all sequences of ``request``; those after the first share the prompt that the first computes.

        Raises:
            RequestError: the cache could never hold it, or its id is in use.
        """
        deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        spec = request.sampling.structured_outputs
        for index in range(request.num_sequences):
            sequence = Request(
                request.child_id(index),
                request.prompt_token_ids,
                _params_of(request, index),
                eos_token_ids=self.facts.eos_token_ids,
                priority=request.priority,
                tenant=request.tenant,
                deadline=deadline,
                cache_salt=request.cache_salt,
                held=RequestState.WAITING_GRAMMAR if spec else None,
                fork_of=request.child_id(0) if index else None,
                pooling=request.pooling,
                final_only=request.final_only,
                embeds=request.embeds,
            )
            try:
                self.scheduler.add(sequence)
            except RequestError:
                self.abort([request.child_id(i) for i in range(index)])
                raise
        if spec:
            self._drafting.update(request.child_id(i) for i in range(request.num_sequences))
            self._grammars.prepare(spec, [request.child_id(i) for i in range(request.num_sequences)])

    def abort(self, sequence_ids: Sequence[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """End sequences from any state; unknown ids are sequences that have ended already."""
        self._grammars.leave(sequence_ids)
        for sequence_id in sequence_ids:
            self.scheduler.abort(sequence_id, reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._under_way)

    def step(self) -> list[Update]:
        """Plan as far ahead as allowed, wait for the oldest step, and return all news."""
        self._release_prepared(0.0)
        while len(self._under_way) < (1 if self._drafting else self._depth):
            plan = self.scheduler.plan_step()
            if not plan.slots and not plan.ends:
                break
            future = self.executor.submit(plan)
            self._under_way.append((plan, future))
            if future.done():  # what it says is known to the next plan, and waits for nothing
                break
        if self._under_way:
            plan, future = self._under_way.popleft()
            self.scheduler.finish_step(plan, future.result())
        else:
            self._release_prepared(GRAMMAR_WAIT_S)
        updates = self.scheduler.take_updates()
        if self._drafting:
            told = (update for update in updates if isinstance(update, RequestUpdate))
            self._drafting.difference_update(update.request_id for update in told if update.finish_reason)
        return updates

    def _release_prepared(self, wait_s: float) -> None:
        """Requests whose grammar is compiled join the queue; the others of a grammar that failed end."""
        for sequence_ids, error in self._grammars.finished(wait_s):
            for sequence_id in sequence_ids:
                if error is None:
                    self.scheduler.ready(sequence_id)
                else:
                    self.scheduler.abort(sequence_id, FinishReason.ERROR, error=error)

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def sleep(self, level: int) -> None:
        """Give the KV cache back, at level 2 the weights too. Nothing may be under way.

        Raises:
            ResourceError: requests are here.
        """
        if self.has_work:
            raise ResourceError(message="sleep: requests are under way; wait for them or abort them first")
        if not self.is_sleeping:
            self.scheduler.reset_prefix_cache()
            self.executor.execute(self.scheduler.plan_step())  # the last slots are given back
            self.executor.sleep(level)
            self.is_sleeping = True

    def wake_up(self) -> None:
        """Be ready for requests again."""
        if self.is_sleeping:
            self.executor.wake_up()
            self.executor.start(self.cache, self.scheduler.config, self._grammars.start)
            self.is_sleeping = False

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def stop(self) -> None:
        """End the loop for good; what is under way is waited for."""
        self._grammars.close()
        self.executor.stop()


def _check_form(probes: Sequence[Probe], vocab_size: int) -> None:
    """Raise ArtifactFormatError where probes cannot prove anything."""
    if not probes:
        raise ArtifactFormatError("manifest.json probes", "none", "one or more: what was handed off is proven by them")
    for index, probe in enumerate(probes):
        for token in probe.token_ids:
            if not 0 <= token < vocab_size:
                raise ArtifactFormatError(f"manifest.json probes[{index}]", token, f"token ids 0..{vocab_size - 1}")


def _params_of(request: EngineRequest, index: int) -> SamplingParams:
    """Each sequence draws by a seed of its own; best_of needs logprobs to choose by."""
    params = request.sampling
    changes: dict[str, Any] = {}
    if params.seed is not None and index:
        changes["seed"] = (params.seed + index + 2**63) % 2**64 - 2**63
    if request.num_sequences > params.n and params.logprobs is None:
        changes["logprobs"] = 0
    return msgspec.structs.replace(params, **changes) if changes else params
