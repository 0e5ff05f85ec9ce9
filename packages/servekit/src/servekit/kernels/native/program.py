"""A list of operations, recorded once and run by one call a step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from servekit.kernels.native.library import CCache, CRows, CStep, Format, Library, Pool
from servekit.kernels.native.memory import aligned
from servekit.kernels.native.packing import I4_GROUP, I8_GROUP, PANEL, PackedWeight
from servekit.kernels.paged_attention.metadata import StepRows

NUMPY: dict[Format, np.dtype[Any]] = {
    Format.F32: np.dtype(np.float32),
    Format.BF16: np.dtype(np.uint16),
    Format.I8: np.dtype(np.int8),
}


class Epilogue(IntEnum):
    """What becomes of a product: ``sk_epilogue``."""

    STORE = 0
    ADD = 1  # to what is there
    SWIGLU = 2  # silu(gate) * up


class Rows:
    """Activations, ``[capacity, cols]``; rows are padded with zeros to 64 numbers.

    Args:
        group: how many columns of I8 rows share a scale.
    """

    def __init__(self, capacity: int, cols: int, format: Format = Format.F32, group: int = I8_GROUP) -> None:
        self.cols = cols
        self.format = format
        self.stride = -(-cols // PANEL) * PANEL
        kind = NUMPY[format]
        self._data = aligned(capacity * self.stride * kind.itemsize).view(kind).reshape(capacity, self.stride)
        groups = (capacity, self.stride // group) if format is Format.I8 else (0, 0)
        self._scales, self._sums = np.zeros(groups, np.float32), np.zeros(groups, np.float32)
        self._offsets = np.zeros(groups, np.int32)
        parts = (self._data, self._scales, self._sums, self._offsets)
        self.c = CRows(*(part.ctypes.data for part in parts), format, cols, self.stride, group)

    def tensor(self) -> Tensor:
        """``[capacity, cols]`` float32, a view."""
        return torch.from_numpy(self._data)[:, : self.cols]

    @classmethod
    def input_of(cls, weight: PackedWeight, library: Library, capacity: int, group: int = I8_GROUP) -> Rows:
        """Rows in the format that ``weight``'s product reads; ``group``: of those beside weights of 8 bits."""
        group = I4_GROUP if weight.format is Format.I4 else group
        return cls(capacity, weight.in_features, library.input_format(weight.format), group)


CACHE_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16, torch.int8: Format.I8}


@dataclass(frozen=True, slots=True)
class Cache:
    """A layer's paged cache as the kernels see it; ``tensor`` is ``[2, blocks, block_size, kv_heads, padded]``.

    Only its first dimensions mean what they say: within a block keys and values lie as ``native/attention.inc.h`` has
    them. ``head_dim`` is what the model has, ``padded`` the next multiple of 16. ``scales``: of an int8 cache,
    ``[2, blocks, block_size, kv_heads]`` float32, within a block one head after the other.
    """

    tensor: Tensor
    head_dim: int
    group: int
    scales: Tensor | None = None

    @property
    def c(self) -> CCache:
        _, num_blocks, block_size, kv_heads, padded = self.tensor.shape
        return CCache(
            self.tensor.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            num_blocks,
            CACHE_FORMATS[self.tensor.dtype],
            block_size,
            kv_heads,
            self.head_dim,
            padded,
            self.group,
        )

    def queries(self, library: Library) -> Format:
        """What queries are beside it: as beside weights of its width, but bfloat16's where it has 8 bits."""
        return library.input_format(Format.F32 if self.tensor.dtype == torch.float32 else Format.BF16)


class Program:
    """Operations in the order in which they were added. Whatever they refer to is kept alive."""

    def __init__(self, library: Library, pool: Pool) -> None:
        self._c = library.c
        self._pool = pool
        self._kept: list[object] = []
        self._names: list[str] = []
        self._rows: Sequence[StepRows] = ()
        self._step = CStep()
        self._handle = self._c.sk_program_new(pool.handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._c.sk_program_free(self._handle)

    def embed(self, table: Tensor, out: Rows) -> None:
        """``table`` is [vocab, hidden], float32 or bfloat16, contiguous."""
        format = Format.BF16 if table.dtype == torch.bfloat16 else Format.F32
        self._c.sk_add_embed(self._handle, table.data_ptr(), format, table.shape[1], out.c)
        self._keep("embed", table, out)

    def norm(self, x: Rows, weight: Tensor, eps: float, out: Rows) -> None:
        """RMSNorm; ``weight`` is [hidden] float32."""
        self._c.sk_add_norm(self._handle, x.c, weight.data_ptr(), eps, out.c)
        self._keep("norm", x, weight, out)

    def convert(self, x: Rows | None, width: int, out: Rows) -> None:
        """``x`` float32, or the input that ``run`` is given, into the format of ``out``."""
        self._c.sk_add_convert(self._handle, None if x is None else x.c, width, out.c)
        self._keep("convert", x, out)

    def pick(self, x: Rows, width: int, out: Rows) -> None:
        """The rows of ``x``, float32, that ``run`` is told of; what is added afterwards works on these."""
        self._c.sk_add_pick(self._handle, x.c, width, out.c)
        self._keep("pick", x, out)

    def add(self, y: Rows, x: Rows) -> None:
        """``x += y``, float32."""
        self._c.sk_add_sum(self._handle, y.c, x.c)
        self._keep("add", y, x)

    def linear(self, x: Rows, weight: PackedWeight, out: Rows, epilogue: Epilogue = Epilogue.STORE) -> None:
        self._c.sk_add_linear(self._handle, x.c, weight.matrix, epilogue, out.c)
        self._keep("linear", x, weight, out)

    def highest(
        self,
        x: Rows,
        weight: PackedWeight,
        columns: int,
        ids: NDArray[np.int64],
        highest: NDArray[np.float32],
    ) -> None:
        """The largest of the first ``columns`` of each row of the product, and where it is first; the rest is not kept.

        Args:
            ids: ``[capacity of x]``, and ``highest``: written; NaN where a row holds one.
        """
        places = ids.ctypes.data, highest.ctypes.data
        self._c.sk_add_highest(self._handle, x.c, weight.matrix, columns, len(ids), *places)
        self._keep("highest", x, weight, ids, highest)
        self._names.append("first")

    def rotary(
        self,
        qkv: Rows,
        heads: int,
        angles: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        cache: Cache,
        queries: Rows,
    ) -> None:
        """Turn queries and keys, and write keys and values to their blocks.

        Args:
            angles: ``[positions, head_dim]`` float32: cosines of the first half, then sines.
            norms: of queries and keys, ``[head_dim]`` float32 each.
        """
        q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._c.sk_add_rotary(self._handle, qkv.c, heads, angles.data_ptr(), q_norm, k_norm, eps, cache.c, queries.c)
        self._keep("rotary", qkv, angles, norms, cache, queries)

    def attention(
        self,
        queries: Rows,
        heads: int,
        cache: Cache,
        out: Rows,
        *,
        scale: float,
        soft_cap: float = 0.0,
        window: int = 0,
    ) -> None:
        self._c.sk_add_attention(self._handle, queries.c, heads, cache.c, scale, soft_cap, window, out.c)
        self._keep("attention", queries, cache, out)
        self._names.append("combine")

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        rows: Sequence[StepRows],
        picks: NDArray[np.int64] | None = None,
    ) -> None:
        """Run over the tokens of a step: ``token_ids`` and ``positions`` ``[tokens]`` int64.

        Args:
            picks: the tokens that ``pick`` takes.
        """
        if rows is not self._rows:  # else their arrays are those of the last run
            self._rows, self._step = rows, _step_of(rows)
        step = self._step
        step.tokens, step.token_ids, step.positions = len(token_ids), token_ids.data_ptr(), positions.data_ptr()
        if picks is not None:
            step.picks, step.num_picks = picks.ctypes.data, len(picks)
        self._c.sk_run(self._handle, ctypes.byref(step))
        step.num_picks = 0

    def run_rows(self, x: Tensor) -> None:
        """Run a program that begins with ``convert(None, ...)`` over ``x`` ``[rows, width]`` float32."""
        step = CStep(tokens=len(x), sequences=0, input=x.data_ptr(), input_stride=x.stride(0))
        self._c.sk_run(self._handle, ctypes.byref(step))

    def profile(self) -> dict[str, float]:
        """Seconds in each kind of operation since it was asked last."""
        taken = np.zeros(len(self._names), np.int64)
        self._c.sk_profile(self._handle, taken.ctypes.data)
        found: dict[str, float] = {}
        for name, nanoseconds in zip(self._names, taken.tolist(), strict=True):
            found[name] = found.get(name, 0.0) + nanoseconds / 1e9
        return found

    def _keep(self, name: str, *things: object) -> None:
        self._names.append(name)
        self._kept.append(things)


def _step_of(rows: Sequence[StepRows]) -> CStep:
    """With what the kernels read of ``rows``, which must stay alive."""
    step = CStep(sequences=len(rows[0].starts))
    step.starts, step.counts = rows[0].starts.ctypes.data, rows[0].counts.ctypes.data
    for group, given in enumerate(rows):
        step.tables[group] = given.tables.ctypes.data
        step.table_strides[group] = given.tables.shape[1]
    return step
