"""What a model is run with: kernels, types, weights, by what is asked for, the platform and the folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common_platform.artifact import ModelFolder
from common_platform.errors import ConfigError
from common_platform.kernels import runs_triton
from common_platform.platforms import Platform, detect
from servekit.execution.current_device import numbered
from servekit.execution.speculative import SpeculativeConfig
from servekit.kernels.choice import GPU
from servekit.kernels.native import native_library
from servekit.layers.kernels import Kernels, deterministic_kernels, kernels_of, rounded_kernels
from servekit.models.registry import architecture_of, native_class

KERNELS = ("auto", "native", "reference", "triton")
FORMATS = {"int8": "I8", "int4": "I4"}  # what --quantization makes of weights on a CPU
QUANTIZATIONS = (*FORMATS, "fp8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = ("fp8", "int8")


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


class Choices:
    """``device``, ``kernels``, ``dtype`` of weights and activations, ``kv_dtype`` of keys and values.

    ``is_native``: the C++ kernels of a CPU run the model.

    Raises:
        ConfigError: what is asked for does not fit together, or cannot run here.
    """

    def __init__(self, config: ExecutorConfig, folder: ModelFolder) -> None:
        self.config = config
        self._folder = folder
        self.platform = platform_of(config.device)
        self.device = numbered(torch.device(self.platform.device_type if config.device == "auto" else config.device))
        self.kernels = self._kernels()
        self.dtype = self._dtype()
        eight_bits = {"int8": torch.int8, "fp8": float8_of(self.platform)}
        self.kv_dtype = eight_bits.get(config.kv_cache_dtype, self.dtype)
        self._check()

    def _dtype(self) -> torch.dtype:
        """On a CPU without our kernels bfloat16 can be very slow: it is used where it was asked for."""
        config, folder = self.config, self._folder
        if config.dtype != "auto":
            return DTYPES[config.dtype]
        stored = DTYPES.get(str(folder.config.get("dtype") or folder.config.get("torch_dtype")), torch.bfloat16)
        if self.device.type != "cpu":
            return stored
        is_native = not config.deterministic and self.native_reason(folder) is None
        return stored if is_native and stored != torch.float16 else torch.float32

    def _kernels(self) -> Kernels:
        """What the layers call, by the platform's facts.

        Raises:
            ConfigError: Triton's are asked for, and cannot run here.
        """
        if self.config.deterministic:
            return deterministic_kernels()
        wanted, reason = self.config.kernels, runs_triton(self.device)
        if wanted == "triton":
            if reason is not None:
                raise ConfigError("kernels", wanted, f"auto or reference here: {reason}", flag="--kernels")
            return self._triton_kernels(self.platform.name if self.platform.name in GPU else GPU[0])
        if wanted == "reference" or reason is not None or self.platform.name not in GPU:
            return Kernels()
        return self._triton_kernels(self.platform.name)

    def _triton_kernels(self, platform: str) -> Kernels:
        kernels, wanted = kernels_of(platform), self.config.quantization
        if wanted is None:
            return kernels
        if wanted == "fp8":
            self._check_float8("quantization", "int8 or int4", "--quantization")
        return rounded_kernels(kernels, wanted, platform, float8_of(self.platform))

    def _check_float8(self, field: str, others: str, flag: str) -> None:
        if self.platform.name in GPU and "float8_e4m3fn" not in self.platform.dtypes:
            limit = f"{others} here: {self.platform.devices[0].name} does not compute with float8"
            raise ConfigError(field, "fp8", limit, flag=flag)

    def native_reason(self, folder: ModelFolder) -> str | None:
        """Why the CPU kernels cannot run this model; None where they can."""
        if self.config.kernels in ("reference", "triton"):
            return f"kernels is {self.config.kernels}"
        if self.device.type != "cpu":
            return f"the device is {self.device.type}"
        if native_library() is None:
            return "they were not built"
        return native_class(architecture_of(folder)).reason_against(folder)

    def _check(self) -> None:
        config, name = self.config, str(self.dtype).removeprefix("torch.")
        if config.deterministic and self.dtype != torch.float32:
            raise ConfigError("dtype", name, "float32, which deterministic needs", flag="--dtype")
        reason = "deterministic has its own" if config.deterministic else self.native_reason(self._folder)
        if self.dtype == torch.float16:
            reason = reason or "the dtype is float16"
        if reason and config.kernels == "native":
            raise ConfigError("kernels", "native", f"reference here: {reason}", flag="--kernels")
        if config.quantization and self.kernels.few_bits is None and (reason or config.quantization not in FORMATS):
            limit = f"none here, for it needs the kernels of a GPU or the native ones of a CPU: {reason}"
            if not reason:
                limit = f"{' or '.join(FORMATS)} on a CPU"
            raise ConfigError("quantization", config.quantization, limit, flag="--quantization")
        self.is_native = reason is None
        self.check_kv_dtype(reason)

    def check_kv_dtype(self, reason: str | None) -> None:
        """Keys and values of 8 bits: of int8 by the native CPU kernels, unless there is a ``reason`` against them."""
        wanted = self.config.kv_cache_dtype
        if wanted == "fp8":
            self._check_float8("kv_cache_dtype", "int8", "--kv-cache-dtype")
        if wanted == "auto" or self.kernels.rope_kv_write is not None or (wanted == "int8" and reason is None):
            return
        limit = "auto or int8 here: fp8 is for a GPU" if reason is None else f"auto here: {reason}"
        raise ConfigError("kv_cache_dtype", wanted, limit, flag="--kv-cache-dtype")


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
