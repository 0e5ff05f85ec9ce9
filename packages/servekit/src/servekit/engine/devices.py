"""How many devices an engine may be told to use."""

from __future__ import annotations

import json
from pathlib import Path

from common_platform.errors import ConfigError, ResourceError
from common_platform.platforms import detect
from servekit.engine.config import EngineConfig

NAME, FLAG = "tensor_parallel_size", "--tensor-parallel-size"


def check_devices(config: EngineConfig) -> None:
    """Say what is wrong with a number of devices other than one, before a model is loaded.

    Raises:
        ConfigError: the model's heads cannot be shared out so, or it could, and this engine does not.
        ResourceError: there are not as many devices.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return
    heads = _num_heads(Path(config.model))
    if heads % size:
        raise ConfigError(NAME, size, f"a divisor of the model's {heads} attention heads", flag=FLAG)
    platform = detect()
    count = max(1, len(platform.devices))
    if size > count:
        raise ResourceError(NAME, size, f"1..{count}, the devices that are here ({platform.name})", flag=FLAG)
    raise ConfigError(NAME, size, "1: this engine uses one device", flag=FLAG, code="unsupported")


def _num_heads(folder: Path) -> int:
    """By the model's own words; 0, which every number divides, where it does not say: loading it will tell why."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_attention_heads")
    except (OSError, ValueError, AttributeError):
        return 0
    return found if isinstance(found, int) else 0
