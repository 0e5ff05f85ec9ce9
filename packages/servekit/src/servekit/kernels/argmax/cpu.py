"""The most likely tokens by the C++ kernels: rows are shared out among threads, and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.argmax.reference import argmax
from servekit.kernels.native import Library, Pool


class NativeArgmax:
    """Called as ``reference.argmax`` is, by one thread at a time; other types than float32 go there."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._library = library
        self._pool = Pool(library, num_threads)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            return argmax(logits)
        rows, cols = logits.shape
        ids, highest = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self._library.c.sk_argmax(
            self._pool.handle, logits.data_ptr(), rows, cols, logits.stride(0), ids.data_ptr(), highest.data_ptr()
        )
        return highest, ids
