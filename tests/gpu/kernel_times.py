"""Each kernel at a serving size: how long it takes, and what share of the device's bounds that is."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.gpu.machine import Stopwatch, bounds, forget, stop_if_broken, synchronize
from tests.gpu.matrix_times import matrix_rows
from tests.gpu.progress import Progress
from tests.gpu.work import device_of
from torch import Tensor

from servekit.kernels.paged_attention.metadata import paged_metadata

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """``make`` returns the call to time; ``bytes`` and ``flops`` are what it must move and compute at the least."""

    name: str
    make: Callable[[], Callable[[], Any]]
    bytes: int
    flops: int
    bound: str  # bandwidth | tensor cores
    target: float


class Sizes:
    """Serving sizes, or tiny ones to try the script itself."""

    def __init__(self, *, is_dry: bool) -> None:
        self.dtype = torch.float32 if is_dry else torch.bfloat16
        self.tokens, self.hidden, self.inner = (4, 64, 96) if is_dry else (8192, 4096, 14336)
        self.heads, self.kv_heads, self.width = (4, 2, 16) if is_dry else (32, 8, 128)
        self.rows, self.context, self.long = (2, 40, 300) if is_dry else (64, 4096, 65536)
        self.prompt = 20 if is_dry else 8192
        self.sampled, self.vocab = (2, 300) if is_dry else (256, 128256)

    def decode_bytes(self, rows: int, context: int, element: int, scale: int = 0) -> int:
        query = 2 * rows * self.heads * self.width * self.dtype.itemsize
        return rows * context * self.kv_heads * 2 * (self.width * element + scale) + query


def cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """Those of this script; imported here, for triton is only where a GPU or the interpreter is."""
    from servekit.kernels.rms_norm import triton_backend as norm
    from servekit.kernels.rope_kv_write import triton_backend as rope
    from servekit.kernels.sample import triton_backend as sampling
    from servekit.kernels.silu_and_mul import triton_backend as gate

    s, element = sizes, sizes.dtype.itemsize

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(s.dtype)

    def add_norm() -> Callable[[], Any]:
        x, residual, weight = randn(s.tokens, s.hidden), randn(s.tokens, s.hidden), randn(s.hidden)
        return lambda: norm.add_rms_norm(x, residual, weight, 1e-5)

    def gated() -> Callable[[], Any]:
        x = randn(s.tokens, 2 * s.inner)
        return lambda: gate.silu_and_mul(x)

    def rotate() -> Callable[[], Any]:
        turned = (s.heads + s.kv_heads) * s.width
        qkv = randn(s.tokens, turned + s.kv_heads * s.width)
        qk, value = qkv[:, :turned].view(s.tokens, -1, s.width), qkv[:, turned:].view(s.tokens, -1, s.width)
        cos, sin = randn(s.tokens, 1, s.width), randn(s.tokens, 1, s.width)
        cache = torch.zeros(2, s.tokens // BLOCK + 2, BLOCK, s.kv_heads, s.width, dtype=s.dtype, device=device)
        places = torch.randperm(s.tokens, device=device) + BLOCK
        return lambda: rope.rope_kv_write(qk, value, cos, sin, cache, places)

    def draw(top_k: int, top_p: float) -> Callable[[], Any]:
        logits = torch.randn(s.sampled, s.vocab, device=device)
        like = {"device": device, "dtype": torch.float32}
        temperature, p = torch.ones(s.sampled, **like), torch.full((s.sampled,), top_p, **like)
        k = torch.full((s.sampled,), top_k, dtype=torch.int32, device=device)
        seeds = torch.arange(s.sampled, device=device)
        return lambda: sampling.sample(logits, temperature, k, p, torch.zeros(s.sampled, **like), seeds)

    norm_bytes = 4 * s.tokens * s.hidden * element
    rope_bytes = s.tokens * s.width * element * (2 * s.heads + 4 * s.kv_heads + 2)
    logits_bytes = s.sampled * s.vocab * 4
    return [
        Case("add_rms_norm", add_norm, norm_bytes, 0, "bandwidth", 0.85),
        Case("silu_and_mul", gated, 3 * s.tokens * s.inner * element, 0, "bandwidth", 0.85),
        Case("rope_kv_write", rotate, rope_bytes, 0, "bandwidth", 0.8),
        Case("sample, greedy or hot", lambda: draw(s.vocab, 1.0), logits_bytes, 0, "bandwidth", 0.5),
        Case("sample, top-k and top-p", lambda: draw(min(50, s.vocab), 0.9), logits_bytes, 0, "bandwidth", 0.1),
        *_attention_cases(sizes, device),
    ]


def _attention_cases(s: Sizes, device: torch.device) -> list[Case]:
    def attend(rows: int, start: int, count: int, stored: torch.dtype) -> Callable[[], Any]:
        return attention_call(s, device, rows, start, count, stored)

    decode_flops = 4 * s.rows * s.context * s.heads * s.width
    return [
        Case(
            f"decode attention, {s.rows} rows x {s.context}",
            lambda: attend(s.rows, s.context - 1, 1, s.dtype),
            s.decode_bytes(s.rows, s.context, s.dtype.itemsize),
            decode_flops,
            "bandwidth",
            0.85,
        ),
        Case(
            f"decode attention, {s.rows} rows x {s.context}, int8 keys and values",
            lambda: attend(s.rows, s.context - 1, 1, torch.int8),
            s.decode_bytes(s.rows, s.context, 1, 4),
            decode_flops,
            "bandwidth",
            0.75,
        ),
        Case(
            f"decode attention, 1 row x {s.long}",
            lambda: attend(1, s.long - 1, 1, s.dtype),
            s.decode_bytes(1, s.long, s.dtype.itemsize),
            4 * s.long * s.heads * s.width,
            "bandwidth",
            0.7,
        ),
        Case(
            f"prefill attention, {s.prompt} tokens",
            lambda: attend(1, 0, s.prompt, s.dtype),
            2 * s.prompt * (s.heads + s.kv_heads) * s.width * s.dtype.itemsize,
            2 * s.prompt * s.prompt * s.heads * s.width,
            "tensor cores",
            0.6,
        ),
    ]


def attention_call(
    s: Sizes, device: torch.device, rows: int, start: int, count: int, stored: torch.dtype
) -> Callable[[], Any]:
    """``rows`` rows of ``count`` new tokens after ``start`` others, in blocks that lie in no order."""
    from servekit.kernels.paged_attention import triton_backend as attention

    per_row = -(-(start + count) // BLOCK)
    cache = torch.randn(2, rows * per_row + 1, BLOCK, s.kv_heads, s.width, device=device, dtype=s.dtype)
    scales = None
    if stored != s.dtype:
        cache = (cache * 30).clamp(-127, 127).to(stored)
        scales = torch.full(cache.shape[:4], 1 / 30, device=device)
    blocks = np.random.default_rng(0).permutation(rows * per_row).astype(np.int32) + 1
    starts, counts = np.full(rows, start), np.full(rows, count)
    metadata = paged_metadata(blocks.reshape(rows, per_row), starts, counts, BLOCK, 0, device)
    query = torch.randn(rows * count, s.heads, s.width, device=device, dtype=s.dtype)
    return lambda: attention.paged_attention(query, cache, metadata, s.width**-0.5, kv_scales=scales)


def all_cases(*, is_dry: bool) -> tuple[torch.device, list[Case]]:
    """Those of this script, of few bits, experts and training."""
    device = device_of(is_dry=is_dry)
    more = [Case(*row) for row in matrix_rows(device, is_dry=is_dry)]
    return device, [*cases(Sizes(is_dry=is_dry), device), *more]


def compile_ahead(progress: Progress, number: int, count: int, *, is_dry: bool) -> int:
    """Call every ``count``-th case once, so that its kernels lie in the cache when it is timed."""
    found = all_cases(is_dry=is_dry)[1][number::count]
    for case in found[:2] if is_dry else found:
        if progress.begins(case.name):
            try:
                case.make()()
                synchronize()
            except Exception as error:  # noqa: BLE001 - the stage that times it tells what is wrong
                progress.put(repr(error)[:200], "passed_over", case.name)
                stop_if_broken()
            forget()
    return 0


def measure(progress: Progress, is_dry: bool) -> int:
    """Every case; one that fails is told with its error, and the others go on."""
    device, found = all_cases(is_dry=is_dry)
    watch = Stopwatch(device, is_dry=is_dry)
    limits = bounds(watch, device, is_dry=is_dry)
    progress.put(limits, "bounds")
    for case in found:
        if not progress.begins(case.name):
            continue
        try:
            seconds = watch.seconds(case.make())
        except Exception as error:  # noqa: BLE001 - told in the report, for whoever mends it
            told = {"error": repr(error)[:500], "trace": traceback.format_exc()[-1500:]}
            progress.put(told, "kernels", case.name)
            progress.put(False, "ok")
            stop_if_broken()
        else:
            progress.put(_share(case, seconds, limits), "kernels", case.name)
        forget()
    return 0


def _share(case: Case, seconds: float, limits: dict[str, float]) -> dict[str, Any]:
    rate, limit = case.bytes / seconds, limits["bandwidth_bytes_per_s"]
    if case.bound != "bandwidth":
        rate, limit = case.flops / seconds, limits["tensor_flops_per_s"]
    share = rate / limit
    figures = {"us": seconds * 1e6, "bound": case.bound, "share": share}
    return figures | {"target": case.target, "met": share >= case.target}
