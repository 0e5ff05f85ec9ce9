"""Safetensors files by our own bounds: the header is checked in full before a byte of data is mapped.

The format: 8 bytes with the header's length, little endian; the header, JSON; the data. Each tensor of the header
has a dtype, a shape, and the range of its bytes in the data; the ranges cover the data without a hole or an overlap.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common_platform.artifact import safe_files, strict_json
from common_platform.errors import ArtifactFormatError, ArtifactMissing

if TYPE_CHECKING:  # loaded with the first tensor: the header can be read without
    import torch
    from torch import Tensor

MAX_HEADER = 100 << 20
DTYPES = {  # torch's name, and the bytes of a number
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


class Entry(NamedTuple):
    kind: str  # a key of DTYPES
    shape: tuple[int, ...]
    start: int  # in the file, bytes
    size: int  # bytes

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.kind][0])
        return found


class SafetensorsFile:
    """One file, mapped; tensors are views of the mapping and live as long as somebody holds one."""

    def __init__(self, folder: Path, name: str, check: Callable[[int], None] = lambda descriptor: None) -> None:
        """Open ``name``; ``check`` is given the descriptor that is mapped afterwards: no other file comes between."""
        self.name = name
        self.metadata: dict[str, str] = {}
        with safe_files.opened(folder, name) as descriptor:
            check(descriptor)
            self._length = os.fstat(descriptor).st_size
            header, start = self._read_header(descriptor)
            self.entries = self._check(header, start)
            self._map = mmap.mmap(descriptor, self._length, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` as a view of the file; do not write to it."""
        if name not in self.entries:
            raise ArtifactMissing(f"{self.name}: {name}", "no such tensor", "one of the file's tensors")
        import torch

        entry = self.entries[name]
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            count = math.prod(entry.shape)
            flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def _fail(self, value: object, limit: str) -> ArtifactFormatError:
        return ArtifactFormatError(self.name, value, limit)

    def _read_header(self, descriptor: int) -> tuple[dict[str, Any], int]:
        if self._length < 8:
            raise self._fail(f"{self._length} bytes", "a safetensors file of 8 bytes or more")
        size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size > min(MAX_HEADER, self._length - 8):
            raise self._fail(f"a header length of {size} bytes", f"at most {min(MAX_HEADER, self._length - 8)} bytes")
        try:
            header = strict_json.loads(os.pread(descriptor, size, 8))
        except ValueError as error:
            raise self._fail(str(error), "a header in strict JSON") from error
        if not isinstance(header, dict):
            raise self._fail(type(header).__name__, "a header that is an object")
        self.metadata = header.pop("__metadata__", None) or {}
        return header, 8 + size

    def _check(self, header: dict[str, Any], start: int) -> dict[str, Entry]:
        entries = {name: self._entry(name, about, start) for name, about in header.items()}
        end, last = start, "no tensor"
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start != end:
                raise self._fail(f"{name} begins at byte {entry.start}", f"{end}: no holes, no overlaps")
            end, last = end + entry.size, name
        if end != self._length:
            raise self._fail(f"{self._length} bytes", f"{end} bytes, where {last} ends")
        return entries

    def _entry(self, name: str, about: Any, start: int) -> Entry:
        if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
            raise self._fail(name, "a tensor with dtype, shape and data_offsets")
        if about["dtype"] not in DTYPES:
            raise self._fail(f"{name}: dtype {about['dtype']}", f"one of {', '.join(DTYPES)}")
        _, item_bytes = DTYPES[about["dtype"]]
        if not _are_naturals(about["shape"]) or not _are_naturals(about["data_offsets"], 2):
            raise self._fail(name, "shapes and offsets of integers from 0 on")
        first, last = about["data_offsets"]
        size = math.prod(about["shape"]) * item_bytes
        if last - first != size or last > self._length:
            raise self._fail(f"{name}: bytes {first}..{last}", f"{size} bytes inside the file")
        return Entry(about["dtype"], tuple(about["shape"]), start + first, size)


def _are_naturals(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return False
    return all(type(value) is int and value >= 0 for value in values)
