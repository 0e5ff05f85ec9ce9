"""Prompt embeddings as callers send them: one tensor in the safetensors format, checked to the last number.

No other format is read: torch's own can carry more than numbers (CVE-2025-62164).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common_platform.artifact import safetensors_reader, strict_json
from common_platform.errors import RequestError
from servekit.core.prompt_embeds import PromptEmbeds

DTYPES = {kind: safetensors_reader.DTYPES[kind] for kind in ("F32", "F16", "BF16")}
WANTED = "safetensors with one tensor [tokens, hidden] of F32, F16 or BF16"
MAX_HEADER_BYTES = 65_536
BF16_EXPONENT = 0x7F80  # all ones: infinite, or not a number


def read_prompt_embeds(content: bytes, path: str, *, hidden_size: int, max_tokens: int) -> PromptEmbeds:
    """The embeddings in ``content``.

    Args:
        path: the caller's name for them, for errors.
        hidden_size: of the model.

    Raises:
        RequestError: code ``invalid_format``, ``invalid_shape``, ``not_finite`` or ``context_length_exceeded``.
    """
    about, data = _only_tensor(content, path)
    dtype, shape = about.get("dtype"), about.get("shape")
    if dtype not in DTYPES:
        raise _malformed(path, f"dtype {dtype}")
    if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
        raise _malformed(path, f"shape {shape}")
    name, width = DTYPES[dtype]
    if len(shape) != 2 or shape[1] != hidden_size:
        raise RequestError(path, _shown(shape), f"[*,{hidden_size}]", code="invalid_shape")
    if about.get("data_offsets") != [0, len(data)] or len(data) != math.prod(shape) * width:
        raise _malformed(path, f"{len(data)} bytes of data for shape {_shown(shape)}")
    if not shape[0]:
        raise RequestError(path, "no tokens", "at least one token", code="empty_prompt")
    if shape[0] > max_tokens:
        allowed = f"at most {max_tokens} tokens, prompt and answer together"
        raise RequestError(path, f"{shape[0]} tokens", allowed, code="context_length_exceeded", flag="--max-model-len")
    if not _all_finite(name, data):
        raise RequestError(path, "infinite numbers, or none", "finite numbers", code="not_finite")
    return PromptEmbeds.of(name, shape[0], hidden_size, data)


def embeds_of(rows: Any, path: str = "prompt_embeds") -> PromptEmbeds:
    """The embeddings in a tensor or an array, ``[tokens, hidden]``, as float32; of the model they are judged later.

    Raises:
        RequestError: code ``invalid_shape``, ``not_finite`` or ``empty_prompt``.
    """
    rows = rows.detach().float().cpu() if hasattr(rows, "detach") else rows  # a tensor, which may be of bfloat16
    numbers = np.ascontiguousarray(rows, dtype="<f4")
    if numbers.ndim != 2:
        raise RequestError(path, _shown(list(numbers.shape)), "[tokens,hidden]", code="invalid_shape")
    if not len(numbers):
        raise RequestError(path, "no tokens", "at least one token", code="empty_prompt")
    if not np.isfinite(numbers).all():
        raise RequestError(path, "infinite numbers, or none", "finite numbers", code="not_finite")
    return PromptEmbeds.of("float32", numbers.shape[0], numbers.shape[1], numbers.tobytes())


def _only_tensor(content: bytes, path: str) -> tuple[dict[str, Any], bytes]:
    """What the header says of the one tensor, and its bytes."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= size <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise _malformed(path, "bytes without its header")
    try:
        header = strict_json.loads(content[8 : 8 + size])
    except ValueError as error:
        raise _malformed(path, "a header that is not JSON") from error
    tensors = [about for name, about in header.items() if name != "__metadata__"] if isinstance(header, dict) else []
    if len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise _malformed(path, f"{len(tensors)} tensors")
    return tensors[0], content[8 + size :]


def _malformed(path: str, got: str) -> RequestError:
    return RequestError(path, got, WANTED, code="invalid_format")


def _shown(shape: list[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _all_finite(dtype: str, data: bytes) -> bool:
    if dtype == "bfloat16":
        return bool(((np.frombuffer(data, "<u2") & BF16_EXPONENT) != BF16_EXPONENT).all())
    return bool(np.isfinite(np.frombuffer(data, "<f4" if dtype == "float32" else "<f2")).all())
