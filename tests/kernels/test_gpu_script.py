"""The script that a GPU will run first, tried on a CPU: its own code, not the numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tests.gpu.work import PROOFS, TEST_FOLDERS, TIMED

from common_platform.kernels import is_interpreted

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not here")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=800)


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.skipif(is_interpreted(), reason="it starts the interpreter itself")
def test_a_dry_run_goes_through_every_phase(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("--dry-run", "--tune", "--budget-s", "3000", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    report = json.loads(out.read_text())
    assert not report["ran"]
    phases = report["phases"]
    assert {name: phase["ok"] for name, phase in phases.items()} == dict.fromkeys(("tests", *PROOFS, *TIMED), True)
    assert phases["tests"]["counts"]["passed"] > 0
    assert phases["parity"]["equal"] == {"graphs": 2, "eager": 2}
    assert all(one["us"] > 0 for one in phases["kernels"]["kernels"].values())
    assert phases["engine-1b"]["runs"]["graphs"]["tokens_per_s"]["2"] > 0
    assert set(phases["training"]["precisions"]) == {"32-true", "bf16-mixed", "bf16-true"}
    assert set(phases["tuning"]["configs"]) == {"paged_attention_decode", "paged_attention_prefill"}
    assert "Measured bounds" in done.stdout  # the page, also where no file comes back


def test_without_a_gpu_it_says_so_and_records_that_nothing_ran(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("--out", str(out), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout
    assert json.loads(out.read_text())["ran"] is False
    assert json.loads(out.read_text())["phases"] == {}


def test_every_test_of_a_kernel_runs_where_there_is_no_hypothesis():
    texts = {path.name: path.read_text() for folder in TEST_FOLDERS for path in (ROOT / folder).glob("test_*.py")}
    needing = [name for name, text in texts.items() if re.search(r"^(from|import) hypothesis", text, re.MULTILINE)]
    assert [name for name in needing if "tests.kernels.backends" in texts[name]] == []


NEEDS = ("torch", "triton", "transformers", "safetensors", "numpy", "pytest")


def top_modules_of(needs: tuple[str, ...]) -> set[str]:
    """The modules of the distributions ``needs`` and of all that these require."""
    wanted, seen = list(needs), set()
    while wanted:
        name = re.split(r"[^A-Za-z0-9._-]", wanted.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        wanted += [one for one in requires if "extra ==" not in one]
    dists = metadata.packages_distributions()
    return {top for top, names in dists.items() if {n.lower().replace("_", "-") for n in names} & seen}


def test_the_engine_and_the_trainer_need_no_more_than_the_script_says(tmp_path):
    """All other packages are hidden, msgspec among them; a tiny model answers, and another is trained."""
    ours = {"common_platform", "servekit", "trainkit", "tests"}
    hidden = set(metadata.packages_distributions()) - top_modules_of(NEEDS) - ours
    assert {"msgspec", "fastapi", "zmq"} <= hidden
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "gpu" / "bare")!r})
from importlib.machinery import PathFinder
class Visible(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {sorted(hidden)!r} and top != "msgspec":
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
import msgspec
assert not hasattr(msgspec, "json")
import torch
from pathlib import Path
from servekit import LLM, SamplingParams
from tests.gpu.folders import SHAPES, write_folder
folder = write_folder(Path({str(tmp_path)!r}), SHAPES["tiny"], torch.float32, torch.device("cpu"))
with LLM(folder, kernels="reference", device="cpu", max_model_len=64) as llm:
    found = llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], SamplingParams(temperature=0, max_tokens=5))
from tests.gpu.progress import Progress
from tests.gpu.training_times import measure
measure(Progress(None), True)
print(len(found[0].outputs[0].token_ids))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 1
