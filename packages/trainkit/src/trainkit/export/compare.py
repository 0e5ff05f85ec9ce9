"""Whether an exported file gives the numbers of the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common_platform.errors import ExportError

RTOL, ATOL = 1e-3, 1e-5


def as_arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sample as the positional and named arguments of ``forward``."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (tuple(sample), {}) if isinstance(sample, tuple | list) else ((sample,), {})


def tensors_in(outputs: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [tensor for value in outputs.values() for tensor in tensors_in(value)]
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return [tensor for value in outputs for tensor in tensors_in(value)]
    return []


def check_same(what: str, wanted: list[Tensor], found: list[Tensor]) -> None:
    """Raises:
    ExportError: the outputs differ in number, shape or by more than rounding; it says by how much.
    """
    if len(wanted) != len(found) or any(a.shape != b.shape for a, b in zip(wanted, found, strict=False)):
        shapes = [list(tensor.shape) for tensor in found]
        raise ExportError(what, f"outputs of shapes {shapes}", f"{[list(tensor.shape) for tensor in wanted]}")
    for a, b in zip(wanted, found, strict=True):
        far = (a.double().cpu() - b.double().cpu()).abs().max().item() if a.numel() else 0.0
        if not torch.allclose(a.double().cpu(), b.double().cpu(), rtol=RTOL, atol=ATOL, equal_nan=True):
            raise ExportError(what, f"outputs that differ by {far:.3g}", f"rtol {RTOL}, atol {ATOL} from the module")
