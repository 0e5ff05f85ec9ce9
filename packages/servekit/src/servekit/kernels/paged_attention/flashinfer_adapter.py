"""Paged attention by FlashInfer (Ye et al., MLSys 2025), where it is installed and was measured to be the faster.

What it does not do here goes to the platform's own kernel: keys and values of eight bits, sinks, float32, steps that
are being recorded in a graph (it plans a step on the host), and steps of which the host has no block tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common_platform.errors import ConfigError
from servekit.kernels.paged_attention.metadata import AttentionMetadata, StepRows

WORKSPACE_BYTES = 128 << 20  # as its documentation advises
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
KINDS = ("decode", "prefill")
EXTRA = "servekit[flashinfer]"


def library() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("flashinfer")
    except ModuleNotFoundError as error:
        raise ConfigError("flashinfer", "not installed", f"pip install '{EXTRA}'") from error


class FlashInferAttention:
    """Called as ``reference.paged_attention`` is.

    Args:
        otherwise: what is called for all that FlashInfer does not do.
        kinds: of ``KINDS``, the steps that it is used for; a step with any prefill in it is one.
    """

    def __init__(self, otherwise: Callable[..., Tensor], kinds: Collection[str] = KINDS) -> None:
        self._library = library()
        self._otherwise = otherwise
        self._kinds = frozenset(kinds)
        self._workspace: Tensor | None = None
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._planned: dict[tuple[Any, ...], StepRows] = {}  # the rows that each wrapper was planned for last

    def __call__(
        self,
        query: Tensor,
        cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        soft_cap: float = 0.0,
        *,
        sinks: Tensor | None = None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        rows = metadata.rows
        if rows is None or sinks is not None or kv_scales is not None or not self._does(query, rows):
            return self._otherwise(query, cache, metadata, scale, soft_cap, sinks=sinks, kv_scales=kv_scales)
        wrapper = self._wrapper(query, cache, rows, scale, soft_cap)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        tokens = int(rows.counts.sum())  # a recorded step has more, which nobody reads
        wrapper.run(query[:tokens].contiguous(), (cache[0], cache[1]), out=out[:tokens])
        return out

    def _does(self, query: Tensor, rows: StepRows) -> bool:
        if _kind(rows) not in self._kinds or query.dtype not in DTYPES or query.shape[2] not in HEAD_DIMS:
            return False
        return not (query.is_cuda and torch.cuda.is_current_stream_capturing())

    def _wrapper(self, query: Tensor, cache: Tensor, rows: StepRows, scale: float, soft_cap: float) -> Any:
        """Planned once a step for all layers that are alike."""
        kind, (heads, width), kv_heads = _kind(rows), query.shape[1:], cache.shape[3]
        key = (kind, heads, kv_heads, width, query.dtype, cache.shape[2], scale, soft_cap, rows.window)
        if key not in self._wrappers:
            self._wrappers[key] = self._made(kind, query.device, heads // kv_heads)
        wrapper = self._wrappers[key]
        if self._planned.get(key) is not rows:
            firsts, blocks, lasts = pages_of(rows, cache.shape[2])
            given = {
                "sm_scale": scale,
                "window_left": rows.window - 1 if rows.window else -1,  # tokens beside the one that looks
                "logits_soft_cap": soft_cap,
                "q_data_type": query.dtype,
                "kv_data_type": cache.dtype,
            }
            if kind == "decode":
                wrapper.plan(firsts, blocks, lasts, heads, kv_heads, width, cache.shape[2], **given)
            else:
                counts = np.concatenate(([0], np.cumsum(rows.counts))).astype(np.int32)
                given |= {"head_dim_qk": width, "page_size": cache.shape[2], "causal": True}
                given |= {"num_qo_heads": heads, "num_kv_heads": kv_heads}
                wrapper.plan(
                    qo_indptr=torch.from_numpy(counts),
                    paged_kv_indptr=firsts,
                    paged_kv_indices=blocks.to(query.device),
                    paged_kv_last_page_len=lasts,
                    **given,
                )
            self._planned[key] = rows
        return wrapper

    def _made(self, kind: str, device: torch.device, group: int) -> Any:
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        if kind == "decode":
            whole = self._library.BatchDecodeWithPagedKVCacheWrapper
            return whole(self._workspace, "NHD", use_tensor_cores=group >= 4)
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")


def _kind(rows: StepRows) -> str:
    return "decode" if int(rows.counts.max()) == 1 else "prefill"


def pages_of(rows: StepRows, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's form of block tables, on the host, int32.

    ``[rows + 1]`` where each row's blocks begin in ``[blocks]``, and ``[rows]`` how many tokens its last block has.
    """
    contexts = rows.starts + rows.counts
    counts = -(-contexts // block_size)
    firsts = np.concatenate(([0], np.cumsum(counts)))
    row_of = np.repeat(np.arange(len(counts)), counts)
    blocks = rows.tables[row_of, np.arange(firsts[-1]) - firsts[row_of]]
    lasts = contexts - (counts - 1) * block_size
    found = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int32)) for part in (firsts, blocks, lasts))
    return next(found), next(found), next(found)
