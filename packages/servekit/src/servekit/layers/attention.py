"""Grouped-query attention over the paged cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from servekit.kernels.kv_write import kv_write, kv_write_quantized
from servekit.kernels.paged_attention import AttentionMetadata, paged_attention
from servekit.kernels.paged_attention.metadata import StepRows, build_metadata
from servekit.kernels.rotary import apply_rotary

MetadataBuilder = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int, torch.device], AttentionMetadata]
Apart = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Embeddings that came with prompts: ``rows`` [count, hidden] stand at ``places`` [count] int64 of a step."""

    places: Tensor
    rows: Tensor

    def put(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden] with these in their places."""
        return x.index_copy(0, self.places, self.rows.to(x.dtype))


@dataclass
class StepInputs:
    """What the layers of one step read.

    ``token_ids``, ``positions``: ``[tokens]`` int64. ``rows``: one a KV group, with its block tables. ``angles``:
    rotary cosines and sines of the positions, filled by the model. ``build``: makes what the attention kernel reads.
    ``apart``: runs a layer's attention where the rest of the step is recorded (``servekit.execution.graphs``).
    ``given``: what stands in place of tokens' embeddings.
    """

    token_ids: Tensor
    positions: Tensor
    rows: list[StepRows]
    block_size: int
    angles: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    build: MetadataBuilder = build_metadata
    apart: Apart | None = None
    given: GivenRows | None = None

    @cached_property
    def attention(self) -> list[AttentionMetadata]:
        """What kernels that are given every place need, one a KV group."""
        device = self.token_ids.device
        return [
            self.build(rows.tables, rows.starts, rows.counts, self.block_size, rows.window, device)
            for rows in self.rows
        ]


class PagedAttention(Protocol):
    """An implementation of ``servekit.kernels.paged_attention``; those for a GPU take ``kv_scales`` as well."""

    def __call__(
        self, query: Tensor, cache: Tensor, metadata: AttentionMetadata, scale: float, soft_cap: float = 0.0
    ) -> Tensor: ...


class RopeKVWrite(Protocol):
    """An implementation of ``servekit.kernels.rope_kv_write``."""

    def __call__(
        self,
        qk: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        places: Tensor,
        *,
        kv_scales: Tensor | None = None,
    ) -> Tensor: ...


class Attention:
    """One layer's attention, this rank's heads of it; its cache is bound once the blocks are counted.

    Args:
        heads, kv_heads: of this rank.
        group: which KV group's block tables it follows.
        kernel: ``weights.kernels.paged_attention``.
        rope_kv_write: ``weights.kernels.rope_kv_write``; None rotates and writes one after the other.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        scale: float,
        group: int = 0,
        soft_cap: float = 0.0,
        kernel: PagedAttention = paged_attention,
        rope_kv_write: RopeKVWrite | None = None,
    ) -> None:
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.group = group
        self.soft_cap = soft_cap
        self.kernel = kernel
        self.rope_kv_write = rope_kv_write
        self.cache = torch.empty(0)
        self.kv_scales: Tensor | None = None  # [2, num_blocks, block_size, kv_heads], of a cache of 8-bit numbers

    def bind(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, num_blocks, block_size, self.kv_heads, self.head_dim)
        zeros = _zeros if device.type == "cpu" else partial(torch.zeros, device=device)
        self.cache = zeros(shape, dtype=dtype)
        self.kv_scales = zeros(shape[:4], dtype=torch.float32) if dtype.itemsize == 1 else None

    @property
    def caches(self) -> list[Tensor]:
        """All tensors whose second dim is blocks: keys and values, and their scales where they have some."""
        return [self.cache] if self.kv_scales is None else [self.cache, self.kv_scales]

    def release(self) -> None:
        """Give the cache's memory back."""
        self.cache, self.kv_scales = torch.empty(0), None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        scale = 4 if dtype.itemsize == 1 else 0
        return 2 * self.kv_heads * (self.head_dim * dtype.itemsize + scale)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, step: StepInputs) -> Tensor:
        """``query`` ``[tokens, heads, head_dim]``, ``key`` and ``value`` ``[tokens, kv_heads, head_dim]``."""
        places = step.attention[self.group].write_places
        if self.kv_scales is None:
            kv_write(self.cache, key, value, places)
        else:
            kv_write_quantized(self.cache, self.kv_scales, key, value, places)
        return self._attend(query, step)

    def rotated(self, qk: Tensor, value: Tensor, angles: tuple[Tensor, Tensor], step: StepInputs) -> Tensor:
        """As a call with queries and keys turned by ``angles``; ``qk`` is ``[tokens, heads + kv_heads, head_dim]``."""
        if self.rope_kv_write is None:
            turned = apply_rotary(qk, *angles)
            return self(turned[:, : self.heads], turned[:, self.heads :], value, step)
        places = step.attention[self.group].write_places
        query = self.rope_kv_write(qk, value, *angles, self.cache, places, kv_scales=self.kv_scales)
        return self._attend(query, step)

    def _attend(self, query: Tensor, step: StepInputs) -> Tensor:
        kernel: Callable[..., Tensor] = self.kernel
        scales = {} if self.kv_scales is None else {"kv_scales": self.kv_scales}

        def attend(query: Tensor) -> Tensor:
            return kernel(query, self.cache, step.attention[self.group], self.scale, self.soft_cap, **scales)

        return step.apart(attend, query) if step.apart else attend(query)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory is taken page by page as it is first written, not all at once."""
    flat = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)
