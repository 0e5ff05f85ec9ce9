"""What the JSON of a model folder may not say: code to fetch or run, and numbers that no run could use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from common_platform.errors import ArtifactConfigError

CODE_KEYS = {"auto_map", "trust_remote_code", "custom_pipelines", "custom_object", "_attn_implementation_hub"}
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation", "kernel_config")  # a name with a slash is a hub's
GENERATION_RANGES = {  # key -> lowest, highest
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_k": (-1, 1 << 31),
    "repetition_penalty": (0.01, 100.0),
    "length_penalty": (-100.0, 100.0),
    "max_length": (0, 1 << 31),
    "max_new_tokens": (0, 1 << 31),
    "min_length": (0, 1 << 31),
    "min_new_tokens": (0, 1 << 31),
    "num_beams": (1, 1 << 16),
}
SIZE_KEYS = ("height", "width", "shortest_edge", "longest_edge")
MAX_SIDE = 1 << 14  # pixels
MAX_AREA = 1 << 28  # pixels; some processors give areas as their shortest and longest edge


def code_keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in ``value`` that names code."""
    if isinstance(value, dict):
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if _names_code(str(key), inner):
                yield where, inner
            yield from code_keys(inner, where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from code_keys(inner, f"{path}[{index}]")


def _names_code(key: str, value: Any) -> bool:
    if key in CODE_KEYS:
        return value not in (None, False, {}, [])
    return key.strip("_") in IMPLEMENTATIONS and isinstance(value, str) and "/" in value


def check_generation(config: dict[str, Any]) -> None:
    """Raise ArtifactConfigError for a default that no request could have."""
    for key, (low, high) in GENERATION_RANGES.items():
        value = config.get(key)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high:
            raise ArtifactConfigError(f"generation_config.json {key}", value, f"{low:g}..{high:g}")


def check_preprocessor(config: dict[str, Any]) -> None:
    """Raise ArtifactConfigError for an image size of nothing, or of more than can be."""
    for name in ("size", "crop_size"):
        sizes = config.get(name)
        if not isinstance(sizes, dict):
            continue  # one number, or none
        for key in SIZE_KEYS:
            most = MAX_SIDE if key in ("height", "width") else MAX_AREA
            value = sizes.get(key)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise ArtifactConfigError(f"preprocessor_config.json {name}.{key}", value, f"pixels 1..{most}")
