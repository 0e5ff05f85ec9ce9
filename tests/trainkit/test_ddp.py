"""Two ranks are one rank with the doubled batch; they stop, resume and fail together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.trainkit.tiny import child_environment

PROGRAM = Path(__file__).parent / "ddp_program.py"
CASES = ["plain", "accumulate", "clip", "manual", "weighted", "stop", "runtime", "sharded", "norm"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(folder: Path, devices: int | str, *cases: str, through: list[str] | None = None) -> subprocess.Popen:
    command = [sys.executable, *(through or []), str(PROGRAM), str(folder), str(devices), *cases]
    environment = child_environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def results(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results(start(tmp_path_factory.mktemp("one"), 1, *CASES))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results(start(tmp_path_factory.mktemp("two"), 2, *CASES, "dropout", "first", "resumed"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_with_the_doubled_batch(one, two, case):
    assert (one[case]["world_size"], two[case]["world_size"]) == (1, 2)
    assert one[case]["steps"] == two[case]["steps"] > 0
    torch.testing.assert_close(
        torch.tensor(one[case]["weights"]), torch.tensor(two[case]["weights"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("case", ["plain", "stop"])
def test_an_evaluation_counts_every_sample_once(one, two, case):
    """23 samples in batches of 5: neither the ranks nor the batches come out even."""
    assert one[case]["metrics"] == pytest.approx(two[case]["metrics"], rel=1e-4)


def test_a_resumed_job_of_two_ranks_is_the_job(two):
    assert two["first"]["steps"] < two["resumed"]["steps"] == two["dropout"]["steps"]
    assert two["resumed"]["weights"] == two["dropout"]["weights"]


def test_ranks_tell_each_other(two):
    assert two["runtime"]["metrics"] == {"ranks": 3.0, "told": 7}


def test_torchrun_starts_the_same_job(one, tmp_path):
    found = results(start(tmp_path, 2, "plain", through=TORCHRUN))
    assert found["plain"]["world_size"] == 2
    torch.testing.assert_close(
        torch.tensor(one["plain"]["weights"]), torch.tensor(found["plain"]["weights"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("case", "named"), [("raises", "rank one gives up"), ("uneven", "rank 0: 8, rank 1: 4|rank 0: .*, rank 1: ")]
)
def test_when_one_rank_fails_all_end_soon_and_the_error_is_shown(tmp_path, case, named):
    began = time.monotonic()
    process = start(tmp_path, 2, case)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(named, err)
    assert time.monotonic() - began < 45


def test_ranks_that_read_the_same_stream_are_told(tmp_path):
    process = start(tmp_path, 2, "unsharded")
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err
    assert err.count("UserWarning: all ranks read the same samples") == 1
    assert "ShardedIterable" in err


LEAVES = """
import os, socket
from datetime import timedelta
import torch
from trainkit.strategies import process_group
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
process_group.join_group("gloo", timedelta(seconds=60), timedelta(seconds=60))
for _ in range(50):
    process_group.reduce(torch.ones(1000), "sum")
process_group._leave()
held = [one for one in process_group._lent if one() is not None]
print(len(process_group._lent) > 0, held, torch.distributed.is_initialized())
"""


def test_a_rank_leaves_when_the_groups_threads_hold_none_of_its_tensors():
    """One that lets go later, when the interpreter is gone, aborts the process."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=100, env=child_environment(), check=True
    )
    assert done.stdout.split("\n")[0] == "True [] False"
