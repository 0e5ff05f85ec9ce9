"""Memory for packed weights: few large areas, so that the system may map them by huge pages.

A step reads every weight once, and by pages of 4 KiB one core reads a third to a half of what it reads by pages of
2 MiB: each small page is looked up, and the processor's own prefetching ends where it does.
"""

from __future__ import annotations

import numpy as np

ALIGNMENT = 64  # bytes: a cache line
HUGE_PAGE = 1 << 21
AREA = 64 * HUGE_PAGE  # what is not written to takes no memory


class Arena:
    """Hands out parts of areas; an area goes when the arena and all its parts are gone."""

    def __init__(self, area: int = AREA) -> None:
        self._size = area
        self._area = np.zeros(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """``[size]`` uint8 zeros that begin at a cache line."""
        if size > len(self._area):
            self._area = aligned(max(size, self._size), HUGE_PAGE)
        taken, self._area = self._area[:size], self._area[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken


def aligned(size: int, to: int = ALIGNMENT) -> np.ndarray:
    """``[size]`` uint8 zeros at a multiple of ``to``; numpy asks for huge pages where there are 4 MiB or more."""
    memory = np.zeros(size + to, np.uint8)
    first = -memory.ctypes.data % to
    return memory[first : first + size]
