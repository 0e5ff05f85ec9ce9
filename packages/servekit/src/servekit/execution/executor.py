"""Who carries plans out. In process: one rank, in one worker thread of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common_platform.artifact import ModelFolder, open_model_folder
from common_platform.errors import ArtifactConfigError, ConfigError
from common_platform.kernels import is_interpreted
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup, ModelFacts
from servekit.core.plan import StepPlan, StepResult
from servekit.execution import logits_processors
from servekit.execution.choices import FORMATS, Choices, ExecutorConfig
from servekit.execution.current_device import make_current, on
from servekit.execution.device_memory import DeviceMemory, MemoryProfile, TorchMemory, profile_memory
from servekit.execution.draft_model import DraftModelProposer
from servekit.execution.graphs import CudaRecorder, Recorder
from servekit.execution.model_runner import GrammarOf, ModelRunner, largest_step, score
from servekit.execution.proposer import NgramProposer, Proposer
from servekit.kernels.native import Format, Pool, native_library
from servekit.layers.parallel import SingleRank
from servekit.layers.weights import Weights
from servekit.models.registry import CausalModel, architecture_of, model_class, native_class

PROBE_BLOCK = 16
SHORT_STEP_S = 5e-4
FEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of a step that ran at once: as much of a ``Future`` as an engine asks of one."""

    _result: StepResult | None
    _error: Exception | None = None

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RuntimeError("result() of no step")
        return self._result


Outcome = Future[StepResult] | Finished


class InProcessExecutor:
    """Loads the model and runs plans one after the other.

    Args:
        model: a model folder, verified when it has a manifest.

    Raises:
        ArtifactError: the folder cannot be used; nothing has been loaded then.
    """

    def __init__(self, model: str | Path, config: ExecutorConfig) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.folder = open_model_folder(model)
        self._folders = [self.folder]
        self._config = config
        self._choices = choices = Choices(config, self.folder)
        self.platform, self.device, self.kernels = choices.platform, choices.device, choices.kernels
        self.dtype, self.kv_dtype = choices.dtype, choices.kv_dtype
        architecture = architecture_of(self.folder)
        made_for = self.folder.config_int("max_position_embeddings", high=1 << 26)
        if config.max_model_len > made_for:
            raise ConfigError("max_model_len", config.max_model_len, f"1..{made_for}", flag="--max-model-len")
        max_positions = config.max_model_len or made_for
        self.model, num_parameters = self._load(self.folder, max_positions)
        self.model_facts = ModelFacts(
            architecture=architecture,
            vocab_size=self.model.vocab_size,
            max_model_len=max_positions,
            eos_token_ids=_eos(self.folder, self.model.vocab_size),
            bos_token_id=self.folder.config.get("bos_token_id"),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            num_parameters=num_parameters,
            embed_size=getattr(self.model, "embed_size", 0),
        )
        self._processors = logits_processors.for_all(config.logits_processors)
        self._proposer = self._make_proposer()
        self._runner: ModelRunner | None = None
        self._thread = self._one_thread("servekit-executor")
        self._collector: ThreadPoolExecutor | None = None  # waits for the device while the next step is launched
        if self.kernels.sample is not None:
            self._collector = self._one_thread("servekit-results")
        self._last: Outcome = Finished(None)
        self._last_s = SHORT_STEP_S  # that the last step took

    def _one_thread(self, name: str) -> ThreadPoolExecutor:
        """Its kernels go to the executor's device."""
        return ThreadPoolExecutor(1, name, initializer=make_current, initargs=(self.device,))

    def _recorder(self) -> Recorder | None:
        """Records steps where the platform can, and where attention reads block tables, which stay in their place."""
        is_wanted = self.kernels.sample is not None and not self._config.enforce_eager
        return CudaRecorder() if is_wanted and self.platform.graph_capture else None

    def profile(
        self, utilization: float, max_num_tokens: int, max_num_seqs: int, memory: DeviceMemory | None = None
    ) -> MemoryProfile:
        """What a GPU has left for keys and values beside the weights and the largest step. Before ``start``.

        Raises:
            ConfigError: nothing is left.
        """
        step = partial(largest_step, self.model, max_num_tokens, max_num_seqs, self.dtype, self.device, self.kernels)
        return profile_memory(
            memory or TorchMemory(self.device), lambda: self._thread.submit(step).result(), utilization
        )

    def _load(self, folder: ModelFolder, max_positions: int) -> tuple[CausalModel, int]:
        """The model and how many parameters it has."""
        weights = Weights(
            folder,
            self.dtype,
            self.device,
            SingleRank(),
            self.kernels,
            allow_nonfinite=self._config.allow_nonfinite,
        )
        choices = self._choices
        library = native_library() if choices.is_native and choices.native_reason(folder) is None else None
        with torch.inference_mode(), on(self.device):
            if library is None:
                return model_class(architecture_of(folder))(weights, max_positions), weights.num_parameters
            plain = Format.F32 if self.dtype == torch.float32 else Format.BF16
            format = Format[FORMATS[self._config.quantization]] if self._config.quantization else plain
            pool = Pool(library, torch.get_num_threads())
            native = native_class(architecture_of(folder))
            return native(weights, max_positions, library, pool, format), weights.num_parameters

    def _make_proposer(self) -> Proposer | None:
        speculative = self._config.speculative
        if speculative is None:
            return None
        if speculative.model is None:
            return NgramProposer(speculative)
        folder = open_model_folder(speculative.model)
        self._folders.append(folder)
        if self._choices.is_native:  # it keeps its keys and values as the target does
            self._choices.check_kv_dtype(self._choices.native_reason(folder))
        positions = self.model_facts.max_model_len
        made_for = folder.config_int("max_position_embeddings", high=1 << 26)
        if made_for < positions:
            limit = f"a draft model of {positions} positions or more"
            raise ConfigError("speculative_config.model", f"{made_for} positions", limit, flag="--max-model-len")
        return DraftModelProposer(
            self._load(folder, positions)[0],
            speculative.num_speculative_tokens,
            vocab_size=self.model.vocab_size,
            target_groups=self.model.kv_groups,
        )

    @property
    def kv_groups(self) -> list[KVGroup]:
        return self.model.kv_groups

    def bytes_per_block(self, block_size: int) -> int:
        """Memory of one block of every group together."""
        attentions = [*self.model.attentions, *(self._proposer.attentions if self._proposer else [])]
        return block_size * sum(attention.bytes_per_token(self.kv_dtype) for attention in attentions)

    def score(self, token_ids: Sequence[int], kv_dtype: torch.dtype = torch.float32) -> list[float]:
        """The logprob of each token after the first, with keys and values of ``kv_dtype``. Only before ``start``."""
        if self._runner is not None:
            raise RuntimeError("score() replaces the KV cache: call it before start()")
        return self._thread.submit(score, self.model, list(token_ids), PROBE_BLOCK, self.device, kv_dtype).result()

    def start(self, cache: CacheConfig, scheduler: SchedulerConfig, grammar_of: GrammarOf | None = None) -> None:
        """Allocate the cache; plans may follow.

        Args:
            grammar_of: makes the state of a structured output; None where no request asks for one.
        """
        with on(self.device):
            if self._proposer:
                self._proposer.bind(cache, scheduler.max_num_seqs, self.kv_dtype, self.device)
            self._runner = ModelRunner(
                self.model,
                cache,
                scheduler,
                self.kv_dtype,
                self.device,
                grammar_of,
                self._proposer,
                self._config.offload_folder,
                self.kernels,
                self._recorder(),
                self._processors,
            )
            if self.kernels.sample is not None and not is_interpreted():
                self._runner.warm_up()

    def submit(self, plan: StepPlan) -> Outcome:
        """Carry ``plan`` out after those submitted before: in a thread of its own, or at once.

        At once where handing it over and back would take longer than what there is to do beside it.
        """
        if self._runner is None:
            raise RuntimeError("submit() before start()")
        if self._collector is not None:
            launched = self._thread.submit(self._runner.launch, plan)
            return self._collector.submit(lambda: launched.result().result())
        if self._last.done() and (self._last_s < SHORT_STEP_S or plan.total_tokens <= FEW_TOKENS):
            try:
                self._last = Finished(self._timed(self._runner, plan))
            except Exception as error:  # noqa: BLE001 - for whoever asks for the result
                self._last = Finished(None, error)
        else:
            self._last = self._thread.submit(self._timed, self._runner, plan)
        return self._last

    def _timed(self, runner: ModelRunner, plan: StepPlan) -> StepResult:
        start = time.perf_counter()
        result = runner.execute(plan)
        self._last_s = time.perf_counter() - start
        return result

    def collective_rpc(
        self, method: str | Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[Any]:
        """Call ``method`` of every rank's model runner between two steps, by name or as a function of the runner."""
        call = getattr(self._runner, method) if isinstance(method, str) else partial(method, self._runner)
        return [self._thread.submit(call, *args, **kwargs).result()]

    def sleep(self, level: int) -> None:
        """Give the cache back, at level 2 the weights too."""
        self._runner = None
        for attention in [*self.model.attentions, *(self._proposer.attentions if self._proposer else [])]:
            attention.release()
        if level == 2:
            del self.model
            self._proposer = None

    def wake_up(self) -> None:
        """Load what was given back; ``start`` comes next."""
        if not hasattr(self, "model"):
            self.model, _ = self._load(self.folder, self.model_facts.max_model_len)
            self._proposer = self._make_proposer()

    def execute(self, plan: StepPlan) -> StepResult:
        return self.submit(plan).result()

    def stop(self) -> None:
        """Let the step under way end; nothing runs afterwards."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._collector is not None:
            self._collector.shutdown(wait=True, cancel_futures=True)
        self._runner = None
        for folder in self._folders:
            folder.close()


def _eos(folder: ModelFolder, vocab_size: int) -> list[int]:
    """The end-of-text tokens, by generation_config.json or else config.json."""
    found = folder.generation_config.get("eos_token_id", folder.config.get("eos_token_id"))
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ArtifactConfigError("config.json eos_token_id", token, f"token ids 0..{vocab_size - 1}")
    return ids
