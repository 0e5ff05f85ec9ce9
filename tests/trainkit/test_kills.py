"""``kill -9`` at random moments: every resume is bit-equal, and no unreadable checkpoint is ever the newest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.trainkit.tiny import child_environment

PROGRAM = Path(__file__).parent / "kill_program.py"


def killed(folder: Path, kills: int, seed: int, how: str, limit_s: float) -> None:
    command = [sys.executable, str(PROGRAM), str(folder), str(kills), str(seed), how]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found.pop("kills") == kills
    assert found.pop("ends") >= 1
    assert set(found.values()) == {0}, found


@pytest.mark.parametrize("how", ["now", "later"])
def test_a_few_kills(tmp_path, how):
    killed(tmp_path, 4, 1, how, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["now", "later"])
def test_five_hundred_kills(tmp_path, how):
    killed(tmp_path, 500, 2, how, 3000)
