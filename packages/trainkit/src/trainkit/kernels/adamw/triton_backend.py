"""One step of AdamW by Triton: one launch for all tensors of a dtype, found by a table of their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work
from trainkit.kernels.adamw import reference
from trainkit.kernels.adamw.group import Rates, Tensors

BLOCK = 1024
STEPS = 16  # blocks of a program
CHUNK = BLOCK * STEPS
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _adamw(
    addresses_ptr,  # [4, tensors] int64: parameters, gradients, means, squares
    elements_ptr,  # [tensors] int64
    corrections_ptr,  # [2, tensors] fp32: step size, square root of the second bias correction
    owners_ptr,  # [chunks] int32: the tensor of each chunk
    numbers_ptr,  # [chunks] int32: which of that tensor's chunks it is
    tensors,
    decay,  # what parameters are multiplied by
    rest1,  # 1 - beta1, rounded once
    beta2,
    rest2,
    eps,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    chunk = tl.program_id(0)
    owner = tl.load(owners_ptr + chunk)
    first = tl.load(numbers_ptr + chunk).to(tl.int64) * (BLOCK * STEPS)
    parameters = tl.load(addresses_ptr + owner).to(tl.pointer_type(PARAMETER))
    gradients = tl.load(addresses_ptr + tensors + owner).to(tl.pointer_type(GRADIENT))
    means = tl.load(addresses_ptr + 2 * tensors + owner).to(tl.pointer_type(MOMENT))
    squares = tl.load(addresses_ptr + 3 * tensors + owner).to(tl.pointer_type(MOMENT))
    elements = tl.load(elements_ptr + owner)
    step_size = tl.load(corrections_ptr + owner)
    bias = tl.load(corrections_ptr + tensors + owner)
    for step in range(STEPS):
        places = first + step * BLOCK + tl.arange(0, BLOCK)
        real = places < elements
        parameter = tl.load(parameters + places, mask=real, other=0.0).to(tl.float32)
        gradient = tl.load(gradients + places, mask=real, other=0.0).to(tl.float32)
        mean = tl.load(means + places, mask=real, other=0.0).to(tl.float32)
        square = tl.load(squares + places, mask=real, other=0.0).to(tl.float32)
        mean += rest1 * (gradient - mean)
        square = square * beta2 + rest2 * gradient * gradient
        parameter = parameter * decay - step_size * mean / (tl.sqrt(square) / bias + eps)
        tl.store(parameters + places, parameter.to(PARAMETER), mask=real)
        tl.store(means + places, mean.to(MOMENT), mask=real)
        tl.store(squares + places, square.to(MOMENT), mask=real)


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """On the device: where tensors lie and which program has which part of which."""

    addresses: Tensor
    elements: Tensor
    owners: Tensor
    numbers: Tensor


def adamw_step(tensors: Tensors, rates: Rates) -> None:
    """As ``reference.adamw_step``, with float32 arithmetic; what does not lie in one piece goes there."""
    for types, places in _by_type(tensors).items():
        part = _some(tensors, places)
        if types is None:
            reference.adamw_step(part, rates)
        else:
            _launch(part, types, rates)


def _launch(tensors: Tensors, types: tuple[torch.dtype, ...], rates: Rates) -> None:
    device = tensors.parameters[0].device
    tables = _tables(tensors, device)
    sizes = [rates.lr / (1 - rates.beta1**step) for step in tensors.steps]
    biases = [(1 - rates.beta2**step) ** 0.5 for step in tensors.steps]
    corrections = torch.tensor([sizes, biases], dtype=torch.float32).to(device, non_blocking=True)
    _adamw[(len(tables.owners),)](
        tables.addresses,
        tables.elements,
        corrections,
        tables.owners,
        tables.numbers,
        len(tensors.parameters),
        1 - rates.lr * rates.weight_decay,
        1 - rates.beta1,
        rates.beta2,
        1 - rates.beta2,
        rates.eps,
        PARAMETER=TYPES[types[0]],
        GRADIENT=TYPES[types[1]],
        MOMENT=TYPES[types[2]],
        BLOCK=BLOCK,
        STEPS=STEPS,
    )


def _tables(tensors: Tensors, device: torch.device) -> _Tables:
    columns = (tensors.parameters, tensors.gradients, tensors.means, tensors.squares)
    elements = torch.tensor([p.numel() for p in tensors.parameters])
    chunks = (elements + CHUNK - 1) // CHUNK
    owners = torch.repeat_interleave(torch.arange(len(chunks)), chunks)
    firsts = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    numbers = torch.arange(len(owners)) - firsts
    addresses = torch.tensor([[one.data_ptr() for one in column] for column in columns])
    found = (addresses, elements, owners.to(torch.int32), numbers.to(torch.int32))
    return _Tables(*(table.to(device, non_blocking=True) for table in found))


def _by_type(tensors: Tensors) -> dict[tuple[torch.dtype, ...] | None, list[int]]:
    """Positions of tensors by the dtypes of parameter, gradient and moments; under None those no launch can take."""
    found: dict[tuple[torch.dtype, ...] | None, list[int]] = {}
    for place, parameter in enumerate(tensors.parameters):
        gradient, mean, square = tensors.gradients[place], tensors.means[place], tensors.squares[place]
        parts = (parameter, gradient, mean, square)
        types = (parameter.dtype, gradient.dtype, mean.dtype)
        plain = all(part.is_contiguous() and part.dtype in TYPES for part in parts) and mean.dtype == square.dtype
        if parameter.numel():
            found.setdefault(types if plain else None, []).append(place)
    return found


def _some(tensors: Tensors, places: Sequence[int]) -> Tensors:
    def pick(column: list[Any]) -> list[Any]:
        return [column[place] for place in places]

    return Tensors(
        pick(tensors.parameters),
        pick(tensors.gradients),
        pick(tensors.means),
        pick(tensors.squares),
        pick(tensors.steps),
    )


def _specialization(name: str, parameter: Any, gradient: Any, moment: Any) -> Specialization:
    scalars = ("decay", "rest1", "beta2", "rest2", "eps")
    return Specialization(
        kernel=_adamw,
        name=name,
        signature={"addresses_ptr": "*i64", "elements_ptr": "*i64", "corrections_ptr": "*fp32"}
        | {"owners_ptr": "*i32", "numbers_ptr": "*i32", "tensors": "i32"}
        | dict.fromkeys(scalars, "fp32"),
        constants={"PARAMETER": parameter, "GRADIENT": gradient, "MOMENT": moment, "BLOCK": BLOCK, "STEPS": STEPS},
    )


SPECIALIZATIONS = (
    _specialization("fp32", tl.float32, tl.float32, tl.float32),
    _specialization("bf16 with fp32 moments", tl.bfloat16, tl.bfloat16, tl.float32),
)

WORKS = (
    Work(
        operation="adamw",
        shape="1.2 G parameters, fp32",
        bytes=7 * 4 * 1_200_000_000,
        flops=14 * 1_200_000_000,
        bound="bandwidth",
        target=0.85,
    ),
)
