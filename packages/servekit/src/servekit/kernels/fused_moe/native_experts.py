"""Experts by the C++ kernels: each is a program of its own, with its weights in the order in which they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.fused_moe.sorted import by_expert
from servekit.kernels.native import Epilogue, Format, Library, PackedWeight, Program, Rows, pack
from servekit.kernels.native.library import Pool

CAPACITY = 256  # rows of an expert at a time


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
        top_k = experts.shape[1]
        pairs, ends = by_expert(experts, self.num_experts)
        tokens = pairs // top_k
        rows = x.float().index_select(0, tokens)
        shares = weights.reshape(-1, 1).index_select(0, pairs)
        results = torch.empty_like(rows)
        first = 0
        for expert, last in enumerate(ends):
            for begin in range(first, last, CAPACITY):
                end = min(begin + CAPACITY, last)
                self._programs[expert].run_rows(rows[begin:end])
                results[begin:end] = self._out.tensor()[: end - begin]
            first = last
        out = torch.zeros(x.shape, dtype=torch.float32)
        out.index_add_(0, tokens, results.mul_(shares))
        return (out if shared is None else out.add_(shared)).to(x.dtype)
