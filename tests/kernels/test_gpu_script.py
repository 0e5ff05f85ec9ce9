"""The script that a GPU will run first, tried on a CPU: its own code, not the numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common_platform.kernels import is_interpreted

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not here")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=280)


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason="it starts the interpreter itself")
def test_a_dry_run_goes_through_every_phase(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    report = json.loads(out.read_text())
    assert not report["ran"]
    assert {name: phase["ok"] for name, phase in report["phases"].items()} == dict.fromkeys(
        ("tests", "parity", "kernels", "engine-1b", "engine-8b", "training"), True
    )
    assert report["phases"]["tests"]["counts"]["tests"] > 0
    assert report["phases"]["parity"]["equal"] == {"graphs": 2, "eager": 2}
    assert all(one["us"] > 0 for one in report["phases"]["kernels"]["kernels"])
    assert report["phases"]["engine-1b"]["graphs"]["tokens_per_s"]["2"] > 0


def test_without_a_gpu_it_says_so_and_records_that_nothing_ran(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("--out", str(out), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout
    assert json.loads(out.read_text())["ran"] is False
    assert json.loads(out.read_text())["phases"] == {}


def test_the_stand_in_for_msgspec_runs_the_engine(tmp_path):
    """A machine without msgspec: the real one is hidden, and a tiny model answers."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "gpu" / "bare")!r})
import msgspec
assert not hasattr(msgspec, "json")
import torch
from pathlib import Path
from servekit import LLM, SamplingParams
from tests.gpu.folders import SHAPES, write_folder
folder = write_folder(Path({str(tmp_path)!r}), SHAPES["tiny"], torch.float32, torch.device("cpu"))
with LLM(folder, kernels="reference", device="cpu", max_model_len=64) as llm:
    found = llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], SamplingParams(temperature=0, max_tokens=5))
print(len(found[0].outputs[0].token_ids))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 1
