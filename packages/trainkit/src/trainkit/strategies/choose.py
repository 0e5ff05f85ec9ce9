"""From the Trainer's arguments to a strategy."""

from __future__ import annotations

from typing import Any

from common_platform.errors import ConfigError
from trainkit.device import choose_device
from trainkit.strategies.base import Strategy
from trainkit.strategies.single import SingleDevice

NAMES = ("auto", "single", "single_device")
ELSEWHERE = ("fsdp", "deepspeed", "ddp_spawn", "ddp_fork", "ddp_notebook", "horovod", "xla", "model_parallel")


def make_strategy(strategy: str | Strategy, accelerator: str, devices: Any) -> Strategy:
    """The strategy that the three arguments mean.

    Raises:
        ConfigError: a name or a number that there is not.
        DeviceError: a device that there is not.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in NAMES:
        raise ConfigError("strategy", strategy, f"one of {NAMES}, or a Strategy")
    if devices not in ("auto", 1, "1", -1, "-1", [0]):
        raise ConfigError("devices", devices, "1 or auto: one device in this version")
    return SingleDevice(choose_device(accelerator))
