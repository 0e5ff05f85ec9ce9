"""Experts by the C++ kernels: each is a program of its own, with its weights in the order in which they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from servekit.kernels.fused_moe.sorted import by_expert
from servekit.kernels.native import Epilogue, Format, Library, PackedWeight, Program, Rows, pack
from servekit.kernels.native.library import Pool

CAPACITY = 256  # rows of an expert at a time
TOGETHER = 1024  # pairs whose rows are gathered and added up at a time: they stay in the cache, and are no new pages


class NativeExperts:
    """Called as ``reference.fused_moe`` is, but for the weights, which it has.

    Args:
        gate_up: ``[experts, 2 * inner, hidden]``, gate above up; float32, bfloat16 or float16.
        down: ``[experts, hidden, inner]``.
        format: what weights become; activations follow (``Library.input_format``).
        pool: threads that nobody else uses; one call at a time.
    """

    def __init__(self, library: Library, pool: Pool, gate_up: Tensor, down: Tensor, format: Format) -> None:
        self.num_experts, self.hidden = gate_up.shape[0], gate_up.shape[2]
        first = [pack(library, pool, format, list(one.chunk(2)), gated=True) for one in gate_up]
        second = [pack(library, pool, format, [one]) for one in down]
        self._x = Rows.input_of(first[0], library, CAPACITY)
        self._inner = Rows.input_of(second[0], library, CAPACITY)
        is_rounded = self._inner.format is Format.I8  # which an epilogue does not write: the scales come first
        self._written = Rows(CAPACITY, self._inner.cols) if is_rounded else self._inner
        self._out = Rows(CAPACITY, self.hidden)
        self._programs = [self._program(library, pool, *pair) for pair in zip(first, second, strict=True)]

    def _program(self, library: Library, pool: Pool, gate_up: PackedWeight, down: PackedWeight) -> Program:
        program = Program(library, pool)
        program.convert(None, self.hidden, self._x)
        program.linear(self._x, gate_up, self._written, Epilogue.SWIGLU)
        if self._written is not self._inner:
            program.convert(self._written, self._inner.cols, self._inner)
        program.linear(self._inner, down, self._out)
        return program

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, shared: Tensor | None = None) -> Tensor:
        """As ``reference.fused_moe``; sums are float32."""
        pairs, ends = by_expert(experts, self.num_experts)
        tokens, shares = pairs // experts.shape[1], weights.reshape(-1, 1).index_select(0, pairs)
        whole, out = x.float(), torch.zeros(x.shape, dtype=torch.float32)
        rows, results = torch.empty(2, min(len(pairs), TOGETHER), self.hidden)
        for first in range(0, len(pairs), TOGETHER):
            mine = tokens[first : first + TOGETHER]
            torch.index_select(whole, 0, mine, out=rows[: len(mine)])
            for expert, begin, end in parts_of(ends, first, first + len(mine)):
                self._programs[expert].run_rows(rows[begin - first : end - first])
                results[begin - first : end - first] = self._out.tensor()[: end - begin]
            out.index_add_(0, mine, results[: len(mine)].mul_(shares[first : first + len(mine)]))
        return (out if shared is None else out.add_(shared)).to(x.dtype)


def parts_of(ends: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """``(expert, begin, end)`` of the pairs ``first`` to ``last``, at most ``CAPACITY`` of one expert at a time.

    Args:
        ends: where each expert's pairs end.
    """
    expert = bisect_right(ends, first)
    while first < last:
        end = min(ends[expert], first + CAPACITY, last)
        if end > first:
            yield expert, first, end
            first = end
        if first == ends[expert]:
            expert += 1
