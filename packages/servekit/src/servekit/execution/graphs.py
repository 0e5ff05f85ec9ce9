"""Steps as recorded graphs: one launch in place of hundreds, so that the device does not wait for Python.

A step that only decodes is one graph for each number of rows, rounded up to a bucket. Any other step is recorded in
pieces: all that lies between the attentions is replayed, and attention, whose work depends on the lengths of the rows,
is launched between the pieces. A step too large for every bucket runs as it is: its kernels hide Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common_platform.errors import ConfigError
from servekit.core.facts import KVGroup
from servekit.kernels.paged_attention.metadata import AttentionMetadata, PagedRows, paged_metadata, to_device
from servekit.layers.attention import StepInputs

PIECEWISE_TOKENS = (8, 16, 32, 64, 128, 192, 256, 384, 512)  # few: each is as many recordings as there are layers
WARM_UPS = 2  # runs before one is recorded: kernels are compiled, libraries make their workspaces


class Recording(Protocol):
    """Kernels that were recorded."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What records kernels on a device; the memory that they use stays theirs."""

    def begin(self) -> None: ...

    def end(self) -> Recording: ...


class CudaRecorder:
    """CUDA graphs, which on AMD are HIP graphs. All recordings share one pool: they are never replayed side by side."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._capture = torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        self._capture.__enter__()

    def end(self) -> Recording:
        self._capture.__exit__(None, None, None)
        return self._graph


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """Which sizes are recorded.

    ``decode``: numbers of rows. ``piecewise``: numbers of tokens of steps that also prefill.
    """

    decode: tuple[int, ...]
    piecewise: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("decode", "piecewise"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ConfigError(f"graphs.{name}", sizes, "sizes of 1 or more, each larger than the one before")

    @classmethod
    def up_to(cls, max_rows: int, max_tokens: int) -> GraphSizes:
        """Decode: powers of two at first, then steps that waste little."""
        return cls(decode=buckets(max_rows), piecewise=tuple(size for size in PIECEWISE_TOKENS if size <= max_tokens))


def buckets(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then in steps of 8 to 64, of 16 to 256 and of 32 on; the last is ``most``."""
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size = size * 2 if size < 8 else size + (8 if size < 64 else 16 if size < 256 else 32)
    return (*sizes, most)


def bucket_of(wanted: int, sizes: Sequence[int]) -> int | None:
    """The smallest of ``sizes`` that holds ``wanted``; None where none does."""
    return next((size for size in sizes if size >= wanted), None)


class Between:
    """What attention reads and leaves between two pieces: one tensor each for all layers and sizes.

    Without it every layer of every size would keep its queries and its result: more memory than all else recorded.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def keep(self, role: str, value: Tensor) -> Tensor:
        """``value`` in the place of its ``role``, where the next layer's value takes its place."""
        key = role, value.shape[1:], value.dtype
        held = self._held.get(key)
        if held is None or len(held) < len(value):
            held = self._held[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
        return held[: len(value)].copy_(value)

    def attend(self, attend: Callable[[Tensor], Tensor], query: Tensor) -> Tensor:
        """By the same places as when it is recorded; the largest size comes first, so that later ones fit."""
        return self.keep("result", attend(self.keep("query", query)))


class Pieces:
    """A forward pass in parts: recordings, and between them what is launched anew each time."""

    def __init__(self, recorder: Recorder, between: Between) -> None:
        self._recorder = recorder
        self._between = between
        self._parts: list[Callable[[], object]] = []

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run ``forward`` once, whose attentions call ``apart``; its result is where each replay leaves its own."""
        self._recorder.begin()
        out = forward()
        self._parts.append(self._recorder.end().replay)
        return out

    def apart(self, attend: Callable[[Tensor], Tensor], query: Tensor) -> Tensor:
        """End a piece, attend, and begin the next piece; what comes back is overwritten by each replay."""
        kept = self._between.keep("query", query)
        self._parts.append(self._recorder.end().replay)

        def again() -> Tensor:
            return self._between.keep("result", attend(kept))

        self._parts.append(again)
        out = again()
        self._recorder.begin()
        return out

    def replay(self) -> None:
        for part in self._parts:
            part()


@dataclass(slots=True)
class Bucket:
    """One size: the tensors that its kernels read, what replays them, and where the hidden states come out."""

    size: int
    step: StepInputs
    replay: Callable[[], None] = field(default=lambda: None)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(slots=True)
class GroupPlaces:
    """A KV group's tensors that recorded kernels read: block tables ``[rows, blocks]``, contexts, places of tokens."""

    tables: Tensor
    contexts: Tensor
    write_places: Tensor
    window: int


@dataclass(slots=True)
class Places:
    """All tensors that recorded kernels read, as long as the largest size asks for."""

    token_ids: Tensor
    positions: Tensor
    firsts: Tensor
    groups: list[GroupPlaces]


def places_of(sizes: GraphSizes, groups: Sequence[KVGroup], max_blocks: int, device: torch.device) -> Places:
    rows, tokens = max((1, *sizes.decode)), max((1, *sizes.decode, *sizes.piecewise))
    zeros, whole, short = partial(torch.zeros, device=device), torch.int64, torch.int32
    return Places(
        zeros(tokens, dtype=whole),
        zeros(tokens, dtype=whole),
        torch.arange(rows + 1, dtype=short, device=device),
        [
            GroupPlaces(
                zeros((rows, max_blocks), dtype=short),
                torch.ones(rows, dtype=short, device=device),
                zeros(tokens, dtype=whole),
                group.window,
            )
            for group in groups
        ],
    )


class GraphedForward:
    """``model.forward`` by recorded graphs where a step fits one.

    Args:
        forward: the model's; each of its attentions reads block tables (``AttentionMetadata.paged``).
        groups: the model's KV groups.
        max_model_len: tokens of the longest context.
    """

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        recorder: Recorder,
        sizes: GraphSizes,
        groups: Sequence[KVGroup],
        *,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._recorder = recorder
        self.sizes = sizes
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._device = device
        self._shared = places_of(sizes, groups, -(-max_model_len // block_size), device)
        self._between = Between()
        self._decodes: dict[int, Bucket] = {}
        self._piecewise: dict[int, Bucket] = {}
        self.num_replays = 0
        self.num_eager = 0

    def record_all(self) -> None:
        """Record every size, the largest first, whose memory the others then share."""
        for size in reversed(self.sizes.decode):
            self._decodes[size] = self._record_decode(size)
        for size in reversed(self.sizes.piecewise):
            self._piecewise[size] = self._record_piecewise(size)

    def __call__(self, inputs: StepInputs) -> Tensor:
        """The hidden states ``[tokens, hidden]``, which the next call may overwrite."""
        tokens = len(inputs.token_ids)
        is_decode = all(len(rows.counts) == tokens for rows in inputs.rows)
        buckets = self._decodes if is_decode else self._piecewise
        size = None if inputs.given is not None else bucket_of(tokens, sorted(buckets))
        if size is None:
            self.num_eager += 1
            return self._forward(inputs)
        self.num_replays += 1
        bucket = buckets[size]
        bucket.step.token_ids[:tokens].copy_(inputs.token_ids, non_blocking=True)
        bucket.step.positions[:tokens].copy_(inputs.positions, non_blocking=True)
        if is_decode:
            self._fill_decode(bucket, inputs)
        else:
            self._fill_piecewise(bucket, inputs)
        bucket.replay()
        return bucket.hidden[:tokens]

    def replay_decode(self, num_rows: int) -> Tensor:
        """A step of ``num_rows`` rows as they were left, for whoever measures what its kernels take."""
        bucket = self._decodes[next(size for size in sorted(self._decodes) if size >= num_rows)]
        bucket.replay()
        return bucket.hidden[:num_rows]

    def _record_decode(self, size: int) -> Bucket:
        bucket = self._bucket(size, rows=size)
        self._warm_up(bucket.step)
        self._recorder.begin()
        bucket.hidden = self._forward(bucket.step)
        bucket.replay = self._recorder.end().replay
        return bucket

    def _record_piecewise(self, size: int) -> Bucket:
        bucket = self._bucket(size, rows=1)
        bucket.step.apart = self._between.attend
        self._warm_up(bucket.step)
        pieces = Pieces(self._recorder, self._between)
        bucket.step.apart = pieces.apart
        bucket.hidden = pieces.record(lambda: self._forward(bucket.step))
        bucket.replay = pieces.replay
        return bucket

    def _warm_up(self, step: StepInputs) -> None:
        for _ in range(WARM_UPS):
            self._forward(step)

    def _bucket(self, size: int, *, rows: int) -> Bucket:
        """Tensors for ``size`` tokens of ``rows`` rows, which all look at the null block.

        They are the first places of those of the largest size: no two sizes are replayed side by side.
        """
        count = size // rows
        shared = self._shared
        step = StepInputs(shared.token_ids[:size], shared.positions[:size], [], self._block_size)
        step.attention = [
            AttentionMetadata(
                self._block_size,
                group.write_places[:size],
                paged=PagedRows(
                    group.tables[:rows],
                    group.contexts[:rows] if rows == size else torch.full_like(group.contexts[:1], size),
                    shared.firsts[: rows + 1] if rows == size else shared.firsts[:2] * size,
                    np.full(rows, count),
                    count,
                    self._max_model_len,
                    group.window,
                ),
            )
            for group in shared.groups
        ]
        return Bucket(size, step)

    def _fill_decode(self, bucket: Bucket, inputs: StepInputs) -> None:
        """The step's rows into the tensors that were recorded; rows beyond them have no context and are passed over."""
        for metadata, rows in zip(bucket.step.attention, inputs.rows, strict=True):
            num_rows, num_blocks = rows.tables.shape
            at = np.arange(num_rows), rows.starts // self._block_size
            places = np.zeros(bucket.size, np.int64)
            places[:num_rows] = rows.tables[at].astype(np.int64) * self._block_size + rows.starts % self._block_size
            contexts = np.zeros(bucket.size, np.int32)
            contexts[:num_rows] = rows.starts + 1
            paged = metadata.paged
            if paged is None:
                raise RuntimeError("a recorded step has lost its block tables")
            metadata.write_places.copy_(to_device(places, self._device), non_blocking=True)
            paged.contexts.copy_(to_device(contexts, self._device), non_blocking=True)
            tables = to_device(rows.tables.astype(np.int32, copy=False), self._device)
            paged.tables[:num_rows, :num_blocks].copy_(tables, non_blocking=True)

    def _fill_piecewise(self, bucket: Bucket, inputs: StepInputs) -> None:
        """Attention is told of the rows as they are; tokens beyond them go to the null block, which nobody reads."""
        for metadata, rows in zip(bucket.step.attention, inputs.rows, strict=True):
            given = paged_metadata(rows.tables, rows.starts, rows.counts, self._block_size, rows.window, self._device)
            metadata.write_places.zero_()
            metadata.write_places[: len(given.write_places)].copy_(given.write_places, non_blocking=True)
            metadata.paged, metadata.rows = given.paged, given.rows
