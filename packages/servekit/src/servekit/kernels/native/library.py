"""The shared library: found, checked and declared to ctypes."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from common_platform.errors import ConfigError
from common_platform.logging import get_logger
from servekit.kernels.native.memory import Arena

API_VERSION = 5
MAX_GROUPS = 8
PATH = Path(__file__).parent / "libservekit_cpu.so"

logger = get_logger(__name__)


class Format(IntEnum):
    """How numbers lie in memory: ``sk_format``."""

    F32 = 0
    BF16 = 1
    I8 = 2
    I4 = 3


class CRows(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("offsets", c_void_p),
        ("format", c_int32),
        ("cols", c_int32),
        ("stride", c_int32),
        ("group", c_int32),
    )


class CMatrix(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("format", c_int32),
        ("n", c_int32),
        ("k", c_int32),
    )


class CCache(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("num_blocks", c_int64),
        ("format", c_int32),
        ("block_size", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("padded_dim", c_int32),
        ("group", c_int32),
    )


class CStep(Structure):
    _fields_ = (
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("tables", c_void_p * MAX_GROUPS),
        ("table_strides", c_int64 * MAX_GROUPS),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("picks", c_void_p),
        ("num_picks", c_int32),
    )


ROWS, MATRIX, CACHE, STEP = POINTER(CRows), POINTER(CMatrix), POINTER(CCache), POINTER(CStep)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "sk_api_version": (c_int32, []),
    "sk_supported": (c_char_p, []),
    "sk_select": (c_int32, [c_char_p]),
    "sk_selected": (c_char_p, []),
    "sk_input_format": (c_int32, [c_int32]),
    "sk_pool_new": (c_void_p, [c_int32, c_int32]),
    "sk_peak": (c_double, [c_void_p, c_int32, c_int32]),
    "sk_read": (c_uint64, [c_void_p, c_void_p, c_int64]),
    "sk_pool_free": (None, [c_void_p]),
    "sk_padded_k": (c_int32, [c_int32, c_int32]),
    "sk_packed_bytes": (c_int64, [c_int32, c_int32, c_int32]),
    "sk_pack": (None, [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_int32, c_void_p, c_void_p]),
    "sk_program_new": (c_void_p, [c_void_p]),
    "sk_program_free": (None, [c_void_p]),
    "sk_run": (None, [c_void_p, STEP]),
    "sk_num_operations": (c_int32, [c_void_p]),
    "sk_profile": (None, [c_void_p, c_void_p]),
    "sk_add_embed": (None, [c_void_p, c_void_p, c_int32, c_int32, ROWS]),
    "sk_add_norm": (None, [c_void_p, ROWS, c_void_p, c_float, ROWS]),
    "sk_add_convert": (None, [c_void_p, ROWS, c_int32, ROWS]),
    "sk_add_pick": (None, [c_void_p, ROWS, c_int32, ROWS]),
    "sk_add_sum": (None, [c_void_p, ROWS, ROWS]),
    "sk_add_linear": (None, [c_void_p, ROWS, MATRIX, c_int32, ROWS]),
    "sk_add_highest": (None, [c_void_p, ROWS, MATRIX, c_int32, c_int32, c_void_p, c_void_p]),
    "sk_add_rotary": (None, [c_void_p, ROWS, c_int32, c_void_p, c_void_p, c_void_p, c_float, CACHE, ROWS]),
    "sk_add_attention": (None, [c_void_p, ROWS, c_int32, CACHE, c_float, c_float, c_int32, ROWS]),
    "sk_argmax": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p]),
}


class Library:
    """The functions of ``native/servekit_cpu.h``, on the best instruction set that the machine has.

    Raises:
        ConfigError: ``SERVEKIT_CPU_ISA`` names one that it has not.
    """

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        if self.c.sk_api_version() != API_VERSION:  # before its functions are looked for: an older one lacks some
            raise OSError(f"{path} has version {self.c.sk_api_version()} of the interface, not {API_VERSION}")
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.supported: list[str] = self.c.sk_supported().decode().split()
        wanted = os.environ.get("SERVEKIT_CPU_ISA")
        if wanted and not self.c.sk_select(wanted.encode()):
            raise ConfigError("SERVEKIT_CPU_ISA", wanted, f"one of {', '.join(self.supported)}")

    @property
    def isa(self) -> str:
        return self.c.sk_selected().decode()

    def input_format(self, weight: Format) -> Format:
        """What activations are beside a weight."""
        return Format(self.c.sk_input_format(weight))


@lru_cache(1)
def native_library() -> Library | None:
    """The library, or None where it was not built; one line of the log says so."""
    try:
        return Library(PATH)
    except OSError as error:
        logger.warning("no CPU kernels here, the reference ones run: %s", error)
        return None


class Pool:
    """Threads for one model's programs, which sleep between steps, and the memory of its packed weights.

    With ``SERVEKIT_CPU_PIN=1`` they stay on cores of their own: for machines on which nothing else runs.
    """

    def __init__(self, library: Library, num_threads: int) -> None:
        self._library = library
        self.num_threads = num_threads
        self.memory = Arena()
        self.handle = library.c.sk_pool_new(num_threads, os.environ.get("SERVEKIT_CPU_PIN") == "1")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.c.sk_pool_free(self.handle)
