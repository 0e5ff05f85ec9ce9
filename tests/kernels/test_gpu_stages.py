"""The stages of the GPU script: what breaks or hangs loses its own case, and what was found before is on the disk."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.gpu import __main__ as script
from tests.gpu.progress import Progress, read
from tests.gpu.stages import AGAIN, BROKEN, Stage, run_stage
from tests.gpu.targets import targets
from tests.gpu.work import TIMED

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import os, pathlib, signal, subprocess, sys, time
from tests.gpu.progress import Progress
p = Progress(pathlib.Path(sys.argv[-1]))
"""
LONG_S = 120  # nothing that is expected to go on comes near
STALL_S = 10


def stage(body: str, *, limit_s: float = LONG_S, stall_s: float = LONG_S) -> Stage:
    return Stage(name="s", command=[sys.executable, "-c", HEAD + body], limit_s=limit_s, stall_s=stall_s)


def run(body: str, folder: Path, **limits: float) -> dict:
    return run_stage(stage(body, **limits), folder, os.environ | {"PYTHONPATH": str(ROOT)})


CASES = """
for case in "abcd":
    if p.begins(case):
        if case == "b":
            {what}
        p.put(case.upper(), "found", case)
"""


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (f"os._exit({BROKEN})", "the device broke"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11"),
        ("raise RuntimeError('one case')", "exit code 1"),
        ("time.sleep(600)", f"nothing new for {STALL_S} s"),
    ],
)
def test_a_case_that_ends_its_process_is_told_and_the_others_go_on(tmp_path, what, why):
    limits = {"stall_s": STALL_S} if "sleep" in what else {}
    found = run(CASES.format(what=what), tmp_path, **limits)
    assert found["found"] == {"a": "A", "c": "C", "d": "D"}
    assert [(failure["case"], failure["why"]) for failure in found["failures"]] == [("b", why)]
    assert not found["ok"]


def test_all_cases_of_a_sound_stage_are_found_by_one_process(tmp_path):
    found = run(CASES.format(what="pass") + "p.put(os.getpid(), 'by')\n", tmp_path)
    assert found["ok"]
    assert found["found"] == {case: case.upper() for case in "abcd"}
    assert "failures" not in found


def test_a_stage_may_ask_for_a_process_for_each_case(tmp_path):
    body = """
for case in "abc":
    if p.begins(case):
        p.put(os.getpid(), "by", case)
        sys.exit(76 if case < "c" else 0)
"""
    found = run(body, tmp_path)
    assert found["ok"]
    assert len(set(found["by"].values())) == 3


def test_a_stage_that_asks_for_more_processes_and_begins_nothing_is_ended(tmp_path):
    assert [failure["case"] for failure in run(f"sys.exit({AGAIN})\n", tmp_path)["failures"]] == [""]


def test_a_stage_that_cannot_begin_is_tried_once(tmp_path):
    found = run("import nothing_of_that_name\n", tmp_path)
    assert [failure["case"] for failure in found["failures"]] == [""]
    assert "nothing_of_that_name" in found["failures"][0]["output"]


def test_what_was_found_is_kept_when_the_time_is_over(tmp_path):
    body = "i = 0\nwhile True:\n    i += 1\n    p.put(i, 'last')\n    time.sleep(0.05)\n"
    found = run(body, tmp_path, limit_s=10)
    assert found["failures"][0]["why"] == "the stage's time was over"
    assert found["last"] >= 1


def test_nothing_that_a_stage_started_outlives_it(tmp_path):
    """Not even where it holds the output open, which would let a reader of it wait for ever."""
    body = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\np.put(child.pid, 'pid')\n"
    for end in ("", "time.sleep(600)\n"):
        folder = tmp_path / str(len(end))
        folder.mkdir()
        found = run(body + end, folder, stall_s=STALL_S if end else LONG_S)
        deadline = time.monotonic() + 60
        while _runs(found["pid"]):
            assert time.monotonic() < deadline, "the child still runs"
            time.sleep(0.05)


def test_the_work_ends_when_the_script_is_killed(tmp_path):
    """By a signal that it cannot answer: nothing may hold the device afterwards."""
    told = tmp_path / "pid"
    work = f"""
import os, pathlib, threading, time
from tests.gpu.work import _end_with
threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
path = pathlib.Path({str(told)!r})
path.with_suffix(".part").write_text(str(os.getpid()))
path.with_suffix(".part").rename(path)
time.sleep(600)
"""
    code = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {work!r}], start_new_session=True)
time.sleep(600)
"""
    script_ = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not told.is_file():
        assert time.monotonic() < deadline, "the work did not begin"
        time.sleep(0.05)
    pid = int(told.read_text())
    script_.kill()
    script_.wait(60)
    while _runs(pid):
        assert time.monotonic() < deadline, "the work goes on"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    path = tmp_path / "p.jsonl"
    progress = Progress(path)
    assert progress.begins("a")
    progress.put({"x": 1}, "deep", "er")
    with path.open("a") as file:
        file.write('{"at": ["deep", "cut')
    assert read(path) == ({"deep": {"er": {"x": 1}}}, ["a"])
    assert not Progress(path).begins("a")


def test_every_outcome_of_a_shard_is_kept_when_one_test_takes_the_process_along(tmp_path):
    tests = tmp_path / "test_these.py"
    lines = ["import os, pytest"]
    lines += [f"def test_{i}():\n    {body}" for i, body in enumerate(["pass", "assert 1 == 2", "os._exit(3)", "pass"])]
    tests.write_text("\n".join(lines) + "\n")
    found: dict[str, dict] = {}
    for shard in range(2):
        body = f"""
os.environ |= {{"GPU_PROGRESS": sys.argv[-1], "GPU_SHARD": "{shard}/2"}}
import pytest
code = pytest.main(["-q", "-c", {str(ROOT / "tests/gpu/pytest.ini")!r}, "-p", "tests.gpu.pytest_shard", {str(tests)!r}])
sys.exit(0 if code in (0, 1) else int(code))
"""
        folder = tmp_path / str(shard)
        folder.mkdir()
        found[str(shard)] = run(body, folder)
    outcomes = {test.rpartition("::")[2]: how for one in found.values() for test, how in one["outcomes"].items()}
    assert outcomes == {"test_0": "passed", "test_1": "failed", "test_3": "passed"}
    ends = [failure["case"].rpartition("::")[2] for one in found.values() for failure in one.get("failures", [])]
    assert ends == ["test_2"]
    whole = script._all_shards(list(found.values()))
    assert whole["counts"] == {"passed": 2, "failed": 1, "skipped": 0}
    assert not whole["ok"]


def test_the_report_on_the_disk_has_every_stage_that_is_over(tmp_path, monkeypatch):
    """Whatever ends the script in the middle: the file is whole, and has what came before."""
    out, seen = tmp_path / "gpu.json", []

    def run_one(one: Stage, folder: Path, env: dict) -> dict:
        phases = json.loads(out.read_text())["phases"] if out.is_file() else {}
        seen.append((one.name, sorted(phases)))
        return (
            {"device": "A", "versions": {}} if one.name == "machine" else {"ok": one.name != "engine-1b", "seconds": 1}
        )

    monkeypatch.setattr(script, "run_stage", run_one)
    arguments = argparse.Namespace(out=out, dry_run=True, only=None, tune=False, budget_s=1000.0)
    run_ = script.Run(tmp_path, arguments)
    run_.time()
    names = [name for name in TIMED if name != "tuning"]
    assert seen == [("machine", []), *((name, sorted(names[:i])) for i, name in enumerate(names))]
    assert json.loads(out.read_text())["phases"]["engine-1b"]["ok"] is False
    tired = script.Run(tmp_path, argparse.Namespace(**vars(arguments) | {"budget_s": 0.0}))
    tired.time()
    assert {phase["skipped"] for phase in json.loads(out.read_text())["phases"].values()} == {"no time left"}


PHASES = {
    "kernels": {
        "kernels": {
            "decode attention, 64 rows x 4096": {"us": 9.0, "share": 0.9, "target": 0.85, "bound": "bandwidth"},
            "linear int8, 16 tokens": {"us": 9.0, "share": 0.5, "target": 0.75, "bound": "bandwidth"},
            "linear int8, 4096 tokens": {"us": 9.0, "share": 0.5, "target": 0.5, "bound": "tensor cores"},
            "experts bf16, 64 tokens": {"us": 10.0, "share": 0.5, "target": 0.6, "bound": "bandwidth"},
            "experts bf16 by a loop of torch, 64 tokens (to compare)": {"us": 30.0, "share": 0.1, "target": 0.0},
            "experts int4, 64 tokens": {"error": "no"},
        }
    },
    "engine-8b": {
        "single_stream_bound_tokens_per_s": 200.0,
        "runs": {
            "graphs": {"tokens_per_s": {"1": 170.0, "256": 9000.0}, "step_s": {"engine": 0.012, "kernels": 0.010}},
            "transformers": {"tokens_per_s": {"1": 30.0, "16": 400.0}},
        },
    },
    "training": {
        "precisions": {
            "32-true": {"step_s": 2.0, "peak_bytes": 100},
            "bf16-mixed": {"step_s": 1.0, "peak_bytes": 70},
        }
    },
}


def test_targets_are_held_against_the_figures_that_are_there():
    rows = {row["name"]: (row["measured"], row["met"]) for row in targets(PHASES)}
    assert rows == {
        "decode attention, 64 rows x 4096: share of bandwidth": (0.9, True),
        "linear int8, 16 tokens: share of bandwidth": (0.5, False),
        "experts bf16, 64 tokens: times as fast as a loop of torch": (3.0, True),
        "engine-8b: a decode step over its kernels": (pytest.approx(1.2), False),
        "engine-8b: a single stream over the bandwidth's bound": (0.85, True),
        "engine-8b: 256 concurrent requests over Transformers' batch of 16": (22.5, True),
        "training in bf16-mixed: times as fast as float32": (2.0, True),
        "training in bf16-mixed: memory saved": (pytest.approx(0.3), False),
    }


@pytest.mark.parametrize("phases", [{}, {"engine-8b": {"ok": False, "skipped": "no time left"}}, {"kernels": {}}])
def test_stages_without_figures_have_no_targets(phases):
    assert targets(phases) == []
