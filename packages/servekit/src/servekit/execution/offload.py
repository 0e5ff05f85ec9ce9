"""Where evicted blocks are kept: host memory, or a file that is gone with the process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common_platform.errors import ResourceError
from servekit.layers.attention import Attention


class OffloadStore:
    """The slots of an offload tier, for every layer.

    Args:
        attentions: bound to their caches.
        folder: where the file is made, which is unlinked at once; None for host memory.

    Raises:
        ResourceError: the folder cannot be written, or the disk has no room; asked for in full now, not later.
    """

    def __init__(self, attentions: Sequence[Attention], num_slots: int, folder: str | None) -> None:
        self._caches = [cache for attention in attentions for cache in attention.caches]
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
        for pairs, saving in ((saves, True), (loads, False)):
            if not pairs:
                continue
            source, target = torch.tensor(pairs).unbind(1)
            for cache, slots in zip(self._caches, self._slots, strict=True):
                if saving:
                    slots[:, target] = cache[:, source.to(cache.device)].to(slots.device)
                else:
                    cache[:, target.to(cache.device)] = slots[:, source].to(cache.device)


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
