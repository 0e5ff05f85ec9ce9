"""Memory of the CPU that is freed goes back to the system, instead of being kept in pieces for later."""

from __future__ import annotations

import ctypes

from common_platform.errors import ConfigError

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def return_freed_memory(min_bytes: int = 1 << 20) -> bool:
    """Let tensors of ``min_bytes`` and more have pages of their own, which their end gives back; for the whole process.

    glibc raises that limit by itself, up to 32 MiB, with each such tensor that is freed. Then activations and
    gradients, which come and go in another order each, leave holes behind that the others do not fill. A page that is
    new must be cleared, so small tensors are better left to the heap.

    Returns:
        Whether the C library can do it; where it cannot, nothing changes.

    Raises:
        ConfigError: ``min_bytes`` is below a page or above 32 MiB, glibc's limit.
    """
    if not 4096 <= min_bytes <= 32 << 20:
        raise ConfigError("min_bytes", min_bytes, f"4096..{32 << 20}")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, min_bytes))
