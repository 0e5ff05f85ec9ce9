"""From the Trainer's arguments to a strategy."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from common_platform.errors import ConfigError, DeviceError, ResourceError
from common_platform.platforms import detect
from trainkit.device import choose_device
from trainkit.strategies.base import Strategy
from trainkit.strategies.ddp import DDPStrategy
from trainkit.strategies.single import SingleDevice

NAMES = ("auto", "single", "single_device", "ddp", "ddp_find_unused_parameters_true")
ELSEWHERE = ("fsdp", "deepspeed", "ddp_spawn", "ddp_fork", "ddp_notebook", "horovod", "xla", "model_parallel")


def make_strategy(strategy: str | Strategy, accelerator: str, devices: Any) -> Strategy:
    """The strategy that the three arguments mean.

    Raises:
        ConfigError: a name or a number that there is not.
        DeviceError: a device that there is not.
        ResourceError: a strategy whose library is not installed.
    """
    if isinstance(strategy, Strategy) and not isinstance(strategy, DDPStrategy):
        return strategy
    if not isinstance(strategy, Strategy) and strategy not in NAMES:
        if strategy == "deepspeed" and find_spec("deepspeed") is None:
            raise ResourceError("strategy", strategy, "deepspeed installed: pip install deepspeed")
        later = " (known, but not part of this version)" if strategy in ELSEWHERE else ""
        raise ConfigError("strategy", f"{strategy}{later}", f"one of {NAMES}, or a Strategy")
    device = choose_device(accelerator)
    chosen = _devices(devices, device)
    ranks = int(os.environ.get("WORLD_SIZE", str(len(chosen))))
    if isinstance(strategy, DDPStrategy):
        strategy.use(device.type, chosen)
        return strategy
    if strategy in ("single", "single_device") or (strategy == "auto" and ranks == 1):
        if len(chosen) > 1:
            raise ConfigError("devices", devices, "1 with strategy='single'; 'ddp' for more")
        index = chosen[0] if device.type in ("cuda", "xpu") else None
        return SingleDevice(torch.device(device.type, index) if index is not None else device)
    made = DDPStrategy(find_unused_parameters=strategy == "ddp_find_unused_parameters_true")
    made.use(device.type, chosen)
    return made


def _devices(given: Any, device: torch.device) -> list[int]:
    """The devices' numbers; on a CPU as many as there are to be processes."""
    there = len(detect(device.type).devices) if device.type in ("cuda", "xpu") else None
    if given in ("auto", -1, "-1"):
        if there is None:
            return list(range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        return list(range(there))
    if isinstance(given, str):
        parts = [part for part in given.split(",") if part.strip()]
        if not parts or not all(part.strip().isdigit() for part in parts):
            raise ConfigError("devices", given, "a number, a list of numbers, or auto")
        given = [int(part) for part in parts] if "," in given else int(parts[0])
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise ConfigError("devices", given, "1 or more, or -1 for all")
        if there is not None and given > there:
            raise DeviceError("devices", given, f"{there}, as many as there are")
        return list(range(given))
    if not isinstance(given, list | tuple) or not given or not all(isinstance(i, int) for i in given):
        raise ConfigError("devices", given, "a number, a list of numbers, or auto")
    twice = [index for index in given if list(given).count(index) > 1]
    if twice:
        raise ConfigError("devices", given, f"each device once: duplicate {twice[0]}")
    if there is not None and max(given) >= there:
        raise DeviceError("devices", max(given), f"0..{there - 1}: there are {there}")
    return list(given)
