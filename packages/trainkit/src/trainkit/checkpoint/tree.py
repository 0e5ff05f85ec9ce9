"""Any training state as JSON and tensors: no format that could name code is ever written or read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from common_platform.errors import CheckpointError

MARKS = ("$tensor", "$tuple", "$items", "$float")


def split(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """``value`` as JSON; its tensors go to ``tensors``, by the place where they stand.

    Raises:
        CheckpointError: something in it is neither a number, a text, None, a list, a tuple, a dictionary nor a tensor.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, list):
        return [split(inner, tensors, f"{path}.{i}") for i, inner in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [split(inner, tensors, f"{path}.{i}") for i, inner in enumerate(value)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: split(inner, tensors, f"{path}.{key}") for key, inner in value.items()}
        items = [[split(k, tensors), split(inner, tensors, f"{path}.{k}")] for k, inner in value.items()]
        return {"$items": items}
    raise CheckpointError(path, type(value).__name__, "numbers, texts, lists, dictionaries and tensors")


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that ``split`` took apart."""
    if isinstance(value, list):
        return [join(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": path}:
            return tensors[path]
        case {"$tuple": items}:
            return tuple(join(inner, tensors) for inner in items)
        case {"$items": items}:
            return {join(key, tensors): join(inner, tensors) for key, inner in items}
        case {"$float": text}:
            return float(text)
    return {key: join(inner, tensors) for key, inner in value.items()}


def without_shared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tied tensors once, and for each other name the one that it stands for."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = tensor.detach().cpu().contiguous()
    return _own_memory(kept), aliases


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views that overlap in other ways are copied: a file has no shared memory."""
    owners: dict[int, int] = {}
    for tensor in tensors.values():
        owners[tensor.untyped_storage().data_ptr()] = owners.get(tensor.untyped_storage().data_ptr(), 0) + 1
    shared = {storage for storage, count in owners.items() if count > 1}
    return {name: t.clone() if t.untyped_storage().data_ptr() in shared else t for name, t in tensors.items()}
