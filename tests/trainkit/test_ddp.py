"""Two ranks are one rank with the doubled batch; they stop, resume and fail together."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from tests.trainkit.tiny import child_environment, dataset

PROGRAM = Path(__file__).parent / "ddp_program.py"
CASES = ["plain", "accumulate", "clip", "manual", "weighted", "stop", "runtime", "sharded", "stream", "norm"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(folder: Path, devices: int | str, *cases: str, through: list[str] | None = None) -> subprocess.Popen:
    command = [sys.executable, *(through or []), str(PROGRAM), str(folder), str(devices), *cases]
    environment = child_environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def results(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


KINDS = ["of_nobody", "of_workers", "of_ranks"]
STREAMS = [f"stream_{kind}:whole" for kind in KINDS] + ["stream_of_nobody:first", "stream_of_nobody:resumed"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results(start(tmp_path_factory.mktemp("one"), 1, *CASES))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results(
        start(tmp_path_factory.mktemp("two"), 2, *CASES, *STREAMS, "dropout", "first", "resumed", "missing", "unsplit")
    )


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_split_over_ranks_and_workers_once(two, kind):
    """Whether it splits itself over the workers, over the ranks (by steps of its own) or not at all."""
    first, second = two[f"stream_{kind}:whole"]["batches"]
    whole = dataset(38).tensors[1].flatten().tolist()
    if kind == "of_ranks":  # its own affair: each of two workers reads all of the rank's part
        assert sorted(chain(*first)) == sorted(whole[::2] * 2)
        assert sorted(chain(*second)) == sorted(whole[1::2] * 2)
        return
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    seen = list(chain(*first, *second))
    assert set(seen) == set(whole)
    assert len(seen) - len(whole) < 4  # as many as shares, made even with the first ones of the epoch


def test_a_stream_goes_on_where_it_stood(two):
    whole, first, resumed = (two[f"stream_of_nobody:{how}"] for how in ("whole", "first", "resumed"))
    assert resumed["weights"] == whole["weights"]
    for rank in range(2):
        before, after = first["batches"][rank], resumed["batches"][rank]
        assert len(before) + len(after) >= len(whole["batches"][rank]) > len(before) > 0
        assert before == whole["batches"][rank][: len(before)]
        assert after == whole["batches"][rank][-len(after) :]


def test_without_our_samplers_each_rank_reads_everything(two):
    whole = dataset(8).tensors[1].flatten().tolist()
    assert two["unsplit"]["batches"] == [[whole[:4], whole[4:]]] * 2


def test_no_rank_goes_on_or_waits_where_ones_part_of_a_checkpoint_is_missing(two):
    said = two["missing"]["said"]
    assert len(said) == 2
    assert all("rank 1" in one for one in said)


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
    """Soon: not only when the collective's 10 minutes are over. The other kinds of loss are in test_lost_rank.py."""
    process = start(tmp_path, 2, case)
    try:
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGKILL)
    assert re.search(named, err)


def test_ranks_that_read_the_same_stream_are_told(tmp_path):
    process = start(tmp_path, 2, "unsharded")
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err
    assert err.count("UserWarning: all ranks read the same samples") == 1
    assert "shards_itself" in err


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
