"""Who carries plans out. In process: one rank, in one worker thread of this process."""

from __future__ import annotations

import os
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
from common_platform.kernels import runs_triton
from common_platform.platforms import Platform, detect
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup, ModelFacts
from servekit.core.plan import StepPlan, StepResult
from servekit.execution import logits_processors
from servekit.execution.device_memory import DeviceMemory, MemoryProfile, TorchMemory, profile_memory
from servekit.execution.draft_model import DraftModelProposer
from servekit.execution.graphs import CudaRecorder, Recorder
from servekit.execution.model_runner import GrammarOf, ModelRunner, largest_step, score
from servekit.execution.proposer import NgramProposer, Proposer
from servekit.execution.speculative import SpeculativeConfig
from servekit.kernels.choice import GPU
from servekit.kernels.native import Format, Pool, native_library
from servekit.layers.kernels import Kernels, deterministic_kernels, kernels_of, rounded_kernels
from servekit.layers.parallel import SingleRank
from servekit.layers.weights import Weights
from servekit.models.registry import CausalModel, architecture_of, model_class, native_class

KERNELS = ("auto", "native", "reference", "triton")
FORMATS = {"int8": "I8", "int4": "I4"}  # what --quantization makes of weights on a CPU
QUANTIZATIONS = (*FORMATS, "fp8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
PROBE_BLOCK = 16
SHORT_STEP_S = 5e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """How a model is loaded and run."""

    dtype: str = "auto"  # auto: float32 on CPU, the checkpoint's own elsewhere
    device: str = "auto"  # auto: a GPU where there is one that kernels are for, else cpu
    num_threads: int = 0  # of the matrix products; 0: torch's choice
    max_model_len: int = 0  # 0: what the model was made for
    speculative: SpeculativeConfig | None = None
    offload_folder: str | None = None
    logits_processors: tuple[str, ...] = ()  # classes that see every request, module:Class
    allow_nonfinite: bool = False  # weights of an artifact may be no finite numbers
    deterministic: bool = False  # the same bits whatever else is computed; in float32
    kernels: str = "auto"  # auto | native | reference | triton
    enforce_eager: bool = False  # no recorded graphs
    kv_cache_dtype: str = "auto"  # auto: dtype | fp8 | int8, with a scale for each head of each token
    quantization: str | None = None  # int8 | int4 | fp8, of the weights; activations are of 8 bits where it is faster

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError("dtype", self.dtype, f"one of auto, {', '.join(DTYPES)}", flag="--dtype")
        if self.kernels not in KERNELS:
            raise ConfigError("kernels", self.kernels, f"one of {', '.join(KERNELS)}", flag="--kernels")
        if self.quantization not in (None, *QUANTIZATIONS):
            limit = f"one of {', '.join(QUANTIZATIONS)}"
            raise ConfigError("quantization", self.quantization, limit, flag="--quantization")
        if self.kv_cache_dtype not in ("auto", *KV_DTYPES):
            limit = f"one of auto, {', '.join(KV_DTYPES)}"
            raise ConfigError("kv_cache_dtype", self.kv_cache_dtype, limit, flag="--kv-cache-dtype")
        if self.num_threads < 0:
            raise ConfigError("num_threads", self.num_threads, "0 or more", flag="--num-threads")


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
        self.platform = platform_of(config.device)
        self.device = torch.device(self.platform.device_type if config.device == "auto" else config.device)
        self._config = config
        self.kernels = self._kernels()
        self.dtype = self._dtype(config, self.folder)
        self.kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, self.dtype)
        self._check()
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="servekit-executor")
        self._collector: ThreadPoolExecutor | None = None  # waits for the device while the next step is launched
        if self.kernels.sample is not None:
            self._collector = ThreadPoolExecutor(1, thread_name_prefix="servekit-results")
        self._last: Future[Any] = self._thread.submit(lambda: None)
        self._last_s = SHORT_STEP_S  # that the last step took

    def _dtype(self, config: ExecutorConfig, folder: ModelFolder) -> torch.dtype:
        """On a CPU without our kernels bfloat16 can be very slow: it is used where it was asked for."""
        if config.dtype != "auto":
            return DTYPES[config.dtype]
        stored = DTYPES.get(str(folder.config.get("dtype") or folder.config.get("torch_dtype")), torch.bfloat16)
        if self.device.type != "cpu":
            return stored
        is_native = not config.deterministic and self._native_reason(folder) is None
        return stored if is_native and stored != torch.float16 else torch.float32

    def _kernels(self) -> Kernels:
        """What the layers call, by the platform's facts.

        Raises:
            ConfigError: Triton's are asked for, and cannot run here.
        """
        if self._config.deterministic:
            return deterministic_kernels()
        wanted, reason = self._config.kernels, runs_triton(self.device)
        if wanted == "triton":
            if reason is not None:
                raise ConfigError("kernels", wanted, f"auto or reference here: {reason}", flag="--kernels")
            return self._triton_kernels(self.platform.name if self.platform.name in GPU else GPU[0])
        if wanted == "reference" or reason is not None or self.platform.name not in GPU:
            return Kernels()
        return self._triton_kernels(self.platform.name)

    def _triton_kernels(self, platform: str) -> Kernels:
        kernels, wanted = kernels_of(platform), self._config.quantization
        if wanted is None:
            return kernels
        if wanted == "fp8" and self.platform.name in GPU and "float8_e4m3fn" not in self.platform.dtypes:
            limit = f"int8 or int4 here: {self.platform.devices[0].name} does not compute with float8"
            raise ConfigError("quantization", wanted, limit, flag="--quantization")
        return rounded_kernels(kernels, wanted, platform, float8_of(self.platform))

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

    def _native_reason(self, folder: ModelFolder) -> str | None:
        """Why the CPU kernels cannot run this model; None where they can."""
        if self._config.kernels in ("reference", "triton"):
            return f"kernels is {self._config.kernels}"
        if self.device.type != "cpu":
            return f"the device is {self.device.type}"
        if native_library() is None:
            return "they were not built"
        return native_class(architecture_of(folder)).reason_against(folder)

    def _check(self) -> None:
        config, name = self._config, str(self.dtype).removeprefix("torch.")
        if config.deterministic and self.dtype != torch.float32:
            raise ConfigError("dtype", name, "float32, which deterministic needs", flag="--dtype")
        reason = "deterministic has its own" if config.deterministic else self._native_reason(self.folder)
        if self.dtype == torch.float16:
            reason = reason or "the dtype is float16"
        if reason and config.kernels == "native":
            raise ConfigError("kernels", "native", f"reference here: {reason}", flag="--kernels")
        if config.quantization and self.kernels.few_bits is None and (reason or config.quantization not in FORMATS):
            limit = f"none here, for it needs the kernels of a GPU or the native ones of a CPU: {reason}"
            if not reason:
                limit = f"{' or '.join(FORMATS)} on a CPU"
            raise ConfigError("quantization", config.quantization, limit, flag="--quantization")
        self._is_native = reason is None
        self._check_kv_dtype(reason)

    def _check_kv_dtype(self, reason: str | None) -> None:
        """Keys and values of 8 bits: of int8 by the native CPU kernels, unless there is a ``reason`` against them."""
        wanted = self._config.kv_cache_dtype
        if wanted == "auto" or self.kernels.rope_kv_write is not None or (wanted == "int8" and reason is None):
            return
        limit = "auto or int8 here: fp8 is for a GPU" if reason is None else f"auto here: {reason}"
        raise ConfigError("kv_cache_dtype", wanted, limit, flag="--kv-cache-dtype")

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
        library = native_library() if self._is_native and self._native_reason(folder) is None else None
        with torch.inference_mode():
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
        if self._is_native:  # it keeps its keys and values as the target does
            self._check_kv_dtype(self._native_reason(folder))
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

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Carry ``plan`` out after those submitted before: in a thread of its own, unless steps are short."""
        if self._runner is None:
            raise RuntimeError("submit() before start()")
        if self._collector is not None:
            launched = self._thread.submit(self._runner.launch, plan)
            return self._collector.submit(lambda: launched.result().result())
        if self._last.done() and self._last_s < SHORT_STEP_S:  # handing it over would take as long
            done: Future[StepResult] = Future()
            try:
                done.set_result(self._timed(self._runner, plan))
            except Exception as error:  # noqa: BLE001 - for whoever asks for the result
                done.set_exception(error)
            self._last = done
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


def platform_of(device: str) -> Platform:
    """The platform of a device by its name; of ``auto`` the best one that kernels are for, else the CPU's."""
    if device == "auto":
        found = detect()
        return found if found.name in GPU else detect("cpu")
    kind = torch.device(device).type
    names = {"cuda": "rocm" if torch.version.hip else "cuda"}
    return detect(names.get(kind, kind))


def float8_of(platform: Platform) -> torch.dtype:
    """The form of float8 that a platform multiplies: MI300 has another one."""
    is_fnuz = platform.devices[0].capability.startswith("gfx94")
    return torch.float8_e4m3fnuz if is_fnuz else torch.float8_e4m3fn


def _eos(folder: ModelFolder, vocab_size: int) -> list[int]:
    """The end-of-text tokens, by generation_config.json or else config.json."""
    found = folder.generation_config.get("eos_token_id", folder.config.get("eos_token_id"))
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ArtifactConfigError("config.json eos_token_id", token, f"token ids 0..{vocab_size - 1}")
    return ids


def total_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_memory() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes of memory that a cache may take without pushing others out."""
    try:
        with open("/proc/meminfo") as lines:  # noqa: PTH123 - a kernel file
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total_memory() // 2
