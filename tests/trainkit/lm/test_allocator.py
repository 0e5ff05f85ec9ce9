"""Memory that is freed in pieces goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from tests.trainkit.tiny import child_environment

from common_platform.errors import ConfigError
from trainkit.lm import return_freed_memory

PROGRAM = """
import sys
import torch
from pathlib import Path
from trainkit.lm.allocator import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

MIB = 1 << 20
if sys.argv[1] == "returns":
    print(return_freed_memory(), file=sys.stderr)
torch.ones(16 * MIB, dtype=torch.uint8)  # freed at once: what large is has been learnt
before = resident()
kept = [torch.ones(2 * MIB, dtype=torch.uint8) for _ in range(100)]
del kept[::2]
print((resident() - before) / MIB)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_holes_between_tensors_are_given_back():
    held = {}
    for how in ("returns", "default"):
        command = [sys.executable, "-c", PROGRAM, how]
        environment = child_environment(OMP_NUM_THREADS="1")
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=True)
        held[how] = float(done.stdout)
        assert ("True" in done.stderr) == (how == "returns")
    assert held["returns"] < 150 < held["default"]  # 100 of 200 MiB are in use


@pytest.mark.parametrize("size", [0, 100, 1 << 30])
def test_a_limit_that_the_library_does_not_have_is_refused(size):
    with pytest.raises(ConfigError, match="min_bytes"):
        return_freed_memory(size)
