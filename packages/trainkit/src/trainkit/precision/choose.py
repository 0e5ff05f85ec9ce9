"""From the Trainer's argument to a precision."""

from __future__ import annotations

from importlib.metadata import entry_points

import torch

from common_platform.errors import ConfigError, ResourceError
from common_platform.platforms import detect
from trainkit.precision.fp8 import FP8Precision
from trainkit.precision.plugins import MixedPrecision, Precision, ScaledMixedPrecision, TruePrecision

PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "fp8", "auto")
SHORT = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
GROUP = "trainkit.precision"  # entry points: name -> a function, torch.device -> Precision
ELSEWHERE = {  # known names that an installed plugin must bring, and what they stand for
    "transformer-engine": "NVIDIA's Transformer Engine",
    "transformer-engine-float16": "NVIDIA's Transformer Engine",
    "apex": "NVIDIA's Apex",
    "xla-true": "torch_xla",
    "xla-bf16": "torch_xla",
}


def make_precision(name: str | int | None, device: torch.device) -> Precision:
    """The precision of that name; 32, 64, "32", "bf16" and "16" are understood as Lightning understands them.

    "auto" takes 16 bits, mixed, where the device computes in them, bfloat16 first, and float32 on a CPU.

    Raises:
        ConfigError: there is none of that name.
        ResourceError: it is that of a plugin or library that is not installed.
        DeviceError: the device cannot do it.
    """
    match SHORT.get(str(name), str(name)):
        case "32-true" | "None":
            return Precision()
        case "64-true":
            return TruePrecision("64-true", torch.float64)
        case "bf16-true":
            return TruePrecision("bf16-true", torch.bfloat16)
        case "16-true":
            return TruePrecision("16-true", torch.float16)
        case "bf16-mixed":
            return MixedPrecision("bf16-mixed", torch.bfloat16)
        case "16-mixed":
            return ScaledMixedPrecision(device)
        case "fp8":
            return FP8Precision(device)
        case "auto":
            return make_precision(_fitting(device), device)
    return _of_plugin(str(name), device)


def _fitting(device: torch.device) -> str:
    if device.type == "cpu":
        return "32-true"
    dtypes = detect(device.type).dtypes
    return "bf16-mixed" if "bfloat16" in dtypes else "16-mixed" if "float16" in dtypes else "32-true"


def _of_plugin(name: str, device: torch.device) -> Precision:
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name in plugins:
        made = plugins[name].load()(device)
        if not isinstance(made, Precision):
            raise ConfigError(f"{GROUP}:{name}", type(made).__name__, "a trainkit.precision.Precision")
        return made
    if name in ELSEWHERE:
        raise ResourceError("precision", name, f"an installed package with an entry point {name!r} in {GROUP!r}, which "
                            f"brings {ELSEWHERE[name]}; there is {', '.join(plugins) or 'none'}")  # fmt: skip
    raise ConfigError("precision", name, f"one of {(*PRECISIONS, *plugins)}")
