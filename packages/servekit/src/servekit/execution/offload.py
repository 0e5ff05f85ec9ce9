"""Where evicted blocks are kept: host memory, or a file that is gone with the process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common_platform.errors import ResourceError
from servekit.execution.copy_stream import CopyStream, copy_stream_of
from servekit.kernels.paged_attention.metadata import to_device
from servekit.layers.attention import Attention


class OffloadStore:
    """The slots of an offload tier, for every layer.

    Copies to and from host memory run on a stream of their own: blocks that leave are gathered at once, so that the
    step which overwrites them need not wait until they have arrived; a step waits for those that it reads.

    Args:
        attentions: bound to their caches.
        folder: where the file is made, which is unlinked at once; None for host memory.
        stream: where copies are queued; None for that of the caches' device.

    Raises:
        ResourceError: the folder cannot be written, or the disk has no room; asked for in full now, not later.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        num_slots: int,
        folder: str | None,
        stream: CopyStream | None = None,
    ) -> None:
        self._caches = [cache for attention in attentions for cache in attention.caches]
        self._stream = stream or copy_stream_of(self._caches[0].device)
        shapes = [(2, num_slots, *cache.shape[2:]) for cache in self._caches]
        if folder is None:
            pin = any(cache.is_cuda for cache in self._caches)
            self._slots = [
                torch.empty(shape, dtype=cache.dtype, pin_memory=pin)
                for shape, cache in zip(shapes, self._caches, strict=True)
            ]
            return
        flat = _unlinked_file(Path(folder), sum(_bytes(s, c.dtype) for s, c in zip(shapes, self._caches, strict=True)))
        self._slots, first = [], 0
        for shape, cache in zip(shapes, self._caches, strict=True):
            last = first + _bytes(shape, cache.dtype)
            self._slots.append(flat[first:last].view(cache.dtype).view(shape))
            first = last

    def move(self, saves: Sequence[tuple[int, int]], loads: Sequence[tuple[int, int]]) -> None:
        """Copy (block, slot) pairs out, then (slot, block) pairs in."""
        if saves:
            self._save(*zip(*saves, strict=True))
        if loads:
            self._load(*zip(*loads, strict=True))

    def _save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        source = to_device(np.asarray(blocks, np.int64), self._caches[0].device)
        leaving = [cache.index_select(1, source) for cache in self._caches]
        self._stream.after_compute()
        with self._stream.copies():
            for staged, kept in zip(leaving, self._slots, strict=True):
                for place, slot in enumerate(slots):
                    for half in range(2):  # each is contiguous on both sides, which a copy needs to run beside the host
                        kept[half, slot].copy_(staged[half, place], non_blocking=True)
                self._stream.keep(staged)

    def _load(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        target = to_device(np.asarray(blocks, np.int64), self._caches[0].device)
        arriving = [cache.new_empty((2, len(blocks), *cache.shape[2:])) for cache in self._caches]
        self._stream.after_compute()  # whose memory they may have been given
        with self._stream.copies():
            for staged, kept in zip(arriving, self._slots, strict=True):
                for place, slot in enumerate(slots):
                    for half in range(2):
                        staged[half, place].copy_(kept[half, slot], non_blocking=True)
                self._stream.keep(staged)
        self._stream.before_compute()
        for cache, staged in zip(self._caches, arriving, strict=True):
            cache.index_copy_(1, target, staged)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _unlinked_file(folder: Path, size: int) -> Tensor:
    """``[size]`` uint8, backed by a file without a name whose room is taken on the disk."""
    try:
        handle, name = tempfile.mkstemp(prefix="servekit-kv-", dir=folder)
    except OSError as error:
        raise ResourceError("kv_offload_folder", str(folder), f"a writable folder ({error.strerror})") from error
    try:
        os.posix_fallocate(handle, 0, size)
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        limit = f"a disk with {size} bytes free; lower --kv-offload-bytes"
        raise ResourceError("kv_offload_folder", str(folder), limit) from error
    finally:
        os.close(handle)
        Path(name).unlink()
