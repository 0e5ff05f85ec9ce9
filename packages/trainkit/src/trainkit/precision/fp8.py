"""Matrix products in 8 bits, by torchao (Micikevicius et al., "FP8 Formats for Deep Learning", 2022)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from common_platform.errors import ConfigError, DeviceError, ResourceError
from common_platform.platforms import detect
from trainkit.precision.plugins import MixedPrecision

MULTIPLE = 16  # what the sizes of a layer must be multiples of
FORMAT = "float8_e4m3fn"


class FP8Precision(MixedPrecision):
    """Linear layers multiply in float8, scaled tensor by tensor; everything else is bf16-mixed. Weights stay float32,
    and so do checkpoints.

    Args:
        emulate: compute with the rounding of float8 on a device that has none; slow, to see what it does to a model.

    Raises:
        ResourceError: torchao is not installed.
        DeviceError: the device does not multiply in float8, and ``emulate`` is False.
    """

    allows_inference_mode = False  # torchao's tensors cannot be converted in it

    def __init__(self, device: torch.device, *, emulate: bool = False) -> None:
        super().__init__("fp8", torch.bfloat16)
        if find_spec("torchao") is None:
            raise ResourceError("precision", "fp8", "torchao installed: pip install 'trainkit[fp8]'")
        if not emulate and FORMAT not in detect(device.type).dtypes:
            raise DeviceError("precision", f"fp8 on {device.type}", f"a device that computes in {FORMAT}; or "
                              "bf16-mixed, or plugins=FP8Precision(device, emulate=True)")  # fmt: skip
        self._emulate = emulate

    def convert(self, module: nn.Module) -> nn.Module:
        """Raises:
        ConfigError: no linear layer has sizes that are multiples of 16.
        """
        float8 = import_module("torchao.float8")
        config = float8.Float8LinearConfig(emulate=self._emulate)
        converted: nn.Module = float8.convert_to_float8_training(
            module, config=config, module_filter_fn=lambda layer, name: _fits(layer)
        )
        if not any(type(layer).__name__ == "Float8Linear" for layer in converted.modules()):
            raise ConfigError("precision", "fp8", f"a linear layer whose sizes are multiples of {MULTIPLE}")
        return converted


def _fits(layer: nn.Module) -> bool:
    """Whether ``layer`` is to be converted, and was not yet."""
    return type(layer) is nn.Linear and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
