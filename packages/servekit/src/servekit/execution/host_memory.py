"""How much memory the machine has, and how much of it is free."""

from __future__ import annotations

import os
from pathlib import Path


def total_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_memory() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes of memory that a cache may take without pushing others out."""
    try:
        with open("/proc/meminfo") as lines:  # noqa: PTH123 - a kernel file
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total_memory() // 2
