"""A lost rank ends the job, by its name: no rank waits for ever, none is left behind, the last checkpoint is whole."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.trainkit.tiny import child_environment

from trainkit import checkpoint

PROGRAM = Path(__file__).parent / "lost_rank_program.py"
LIMIT_S = 200  # far below torch's own 10 minutes and above what a stalled machine needs


def start(folder: Path, fault: str, place: str, rank: int) -> subprocess.Popen:
    environment = child_environment(OMP_NUM_THREADS="1", PATIENCE_S="10")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, str(PROGRAM), str(folder), fault, place, str(rank)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def job(folder: Path, fault: str, place: str, rank: int = 1) -> tuple[int, str]:
    """How the first rank of two ends, and what they say. Both of their processes are over then."""
    process = start(folder, fault, place, rank)
    try:
        err = process.communicate(timeout=LIMIT_S)[1]  # ends when both have closed it
        pids = [int(pid) for pid in re.findall(r"^pid \d (\d+)$", err, re.MULTILINE)]
        assert len(pids) == 2
        wait_until(lambda: all(is_over(pid) for pid in pids))
    finally:
        end(process)
    return process.returncode, err


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


SLOW = pytest.mark.slow
CASES = [
    pytest.param("killed", "backward", 6, "rank 1"),
    pytest.param("stopped", "collective", 6, "rank 1: no sign of life"),
    pytest.param("raises", "save", 1, "rank one gives up", marks=SLOW),
    pytest.param("stopped", "rendezvous", 6, "rank 1 of 2 did not come"),
    pytest.param("sleeps", "forward", 6, "rank 1: alive, at operation", marks=SLOW),
    pytest.param("killed", "forward", 6, "rank 1", marks=SLOW),
    pytest.param("killed", "collective", 6, "rank 1", marks=SLOW),
    pytest.param("killed", "save", 6, "rank 1", marks=SLOW),
    pytest.param("stopped", "forward", 6, "rank 1: no sign of life", marks=SLOW),
    pytest.param("stopped", "backward", 6, "rank 1: no sign of life", marks=SLOW),
    pytest.param("stopped", "save", 6, "rank 1: no sign of life", marks=SLOW),
    pytest.param("raises", "forward", 1, "rank one gives up", marks=SLOW),
    pytest.param("raises", "backward", 1, "rank one gives up", marks=SLOW),
    pytest.param("raises", "collective", 1, "rank one gives up", marks=SLOW),
    pytest.param("raises", "rendezvous", 1, "rank one gives up", marks=SLOW),
    pytest.param("killed", "rendezvous", 6, "rank 1", marks=SLOW),
]


@pytest.mark.parametrize(("fault", "place", "status", "says"), CASES)
def test_a_lost_rank_ends_the_job_by_its_name(tmp_path, fault, place, status, says):
    code, err = job(tmp_path, fault, place)
    assert re.search(says, err), err
    assert code == status, err
    kept = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert bool(kept) == (place != "rendezvous")
    for path in kept:
        checkpoint.load(path)


def test_when_the_first_rank_is_killed_the_one_that_it_started_ends_too(tmp_path):
    code, err = job(tmp_path, "killed", "backward", rank=0)
    assert code == -signal.SIGKILL
    assert "rank 0" in err


@SLOW
def test_when_the_first_rank_is_stopped_the_others_end_by_its_name(tmp_path):
    """Its own process is left as it is: whoever stopped it may want to look at it."""
    process = start(tmp_path, "stopped", "backward", rank=0)
    said = ""
    try:
        while "RankLost: " not in said:
            said += process.stderr.readline()
        other = int(re.search(r"pid 1 (\d+)", said)[1])
        wait_until(lambda: is_over(other))
        assert not is_over(process.pid)
    finally:
        end(process)
        said += process.communicate(timeout=LIMIT_S)[1]
    assert re.search("RankLost: .*rank 0, or who keeps the job's store, does not answer", said), said


def is_over(pid: int) -> bool:
    """Also where its parent, which is stopped, has not asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
