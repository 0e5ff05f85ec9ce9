"""The settings of an engine, in the words of vLLM's users."""

from __future__ import annotations

from typing import Any

import msgspec

from common_platform.errors import ConfigError
from servekit.core.config import BLOCK_SIZES, POLICIES
from servekit.execution.speculative import SpeculativeConfig
from servekit.sampling.structured.limits import GrammarLimits

GIB = 1 << 30


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is decided before the model is loaded. Plain data: it crosses to the engine's process."""

    model: str  # a model folder
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto: a GPU where there is one that kernels are for, else cpu
    num_threads: int = 0  # 0: torch's choice
    kernels: str = "auto"  # auto | native | reference | triton
    tensor_parallel_size: int = 1  # devices that share the weights; see check_devices
    enforce_eager: bool = False  # no recorded graphs on a GPU
    kv_cache_dtype: str = "auto"  # auto: as dtype | int8 | fp8, on a GPU
    quantization: str | None = None  # int8 | int4 | fp8 (on a GPU), of the weights
    max_model_len: int | None = None  # tokens; None: what the model was made for
    block_size: int = 16  # tokens per KV block
    kv_cache_memory_bytes: int | None = None  # None: by the share below
    gpu_memory_utilization: float | None = None  # of the device's memory, weights included; None: see CACHE_SHARE
    enable_prefix_caching: bool = True
    prefix_caching_hash_algo: str = "sha256"  # of blocks: what an attacker cannot make collide
    kv_offload_bytes: int = 0  # of a second tier for evicted prefixes, in host memory or
    kv_offload_folder: str | None = None  # on this disk
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    async_scheduling: bool = True
    speculative_config: SpeculativeConfig | None = None  # drafts; steps are then planned one at a time
    deterministic: bool = False  # a request has the same bits whatever is computed with it; slower, and float32 only
    logits_processors: list[str] = []  # classes that see every request, as module:Class
    enable_lora: bool = False  # there are no adapters yet
    allow_nonfinite: bool = False  # take an artifact with weights that are no finite numbers
    probe_tolerance: float | None = None  # nats; None: by dtype
    grammar_limits: GrammarLimits = GrammarLimits()
    otlp_traces_endpoint: str | None = None  # an OpenTelemetry collector's, for a span a request

    def __post_init__(self) -> None:
        self._at_least("tensor_parallel_size", 1)
        self._at_least("max_num_seqs", 1)
        self._at_least("max_num_batched_tokens", 1)
        self._at_least("long_prefill_token_threshold", 0)
        self._at_least("num_threads", 0)
        self._at_least("kv_offload_bytes", 0)
        if self.max_model_len is not None:
            self._at_least("max_model_len", 2)
        if self.kv_cache_memory_bytes is not None:
            self._at_least("kv_cache_memory_bytes", 1)
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:  # also not a number
            name = "gpu_memory_utilization"
            raise ConfigError(name, self.gpu_memory_utilization, "a share in (0,1]", flag=self._flag(name))
        self._one_of("block_size", BLOCK_SIZES)
        self._one_of("scheduling_policy", POLICIES)
        self._one_of("prefix_caching_hash_algo", ("sha256",))
        if self.enable_lora:
            raise ConfigError("enable_lora", True, "false: this engine has no adapters", flag="--enable-lora")
        self._one_of("dtype", ("auto", "float32", "bfloat16", "float16"))

    def _flag(self, name: str) -> str:
        return "--" + name.replace("_", "-")

    def _at_least(self, name: str, low: int) -> None:
        value: Any = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(name, value, f"{low} or more", flag=self._flag(name))

    def _one_of(self, name: str, choices: tuple[Any, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(name, getattr(self, name), f"one of {choices}", flag=self._flag(name))
