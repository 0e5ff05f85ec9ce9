"""The journey as a whole, on a tiny model: train, hand off, serve, ask; and Ctrl-C anywhere on the way."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from tests.tiny import make_folder

from common_platform.artifact import verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_and_serve.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("demo") / "tiny", max_position_embeddings=512)


def start(model: Path, out: Path, *more: str, steps: int = 4) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), "--model", str(model), "--out", str(out), "--steps", str(steps)]
    command += ["--held-out", "8", "--train-seconds", "60", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "120"}


def test_the_whole_journey(model, tmp_path):
    process = start(model, tmp_path / "out", "--keep")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["train_steps"] == 4
    assert len(summary["answers"]) == 3
    assert summary["time_to_first_token_ms"] > 0
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert verify(tmp_path / "out" / "tuned").provenance["metrics"]["val_loss"] == summary["held_out_loss_after"]
    with (tmp_path / "out" / "training" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train_loss"]) for row in rows) == 4
    assert sum(bool(row["val_loss"]) for row in rows) >= 2
    _use_and_end_the_kept_server(said)


def _use_and_end_the_kept_server(said: str) -> None:
    server = psutil.Process(int(re.search(r"^kill (\d+)", said, re.MULTILINE)[1]))
    family = [server, *server.children(recursive=True)]
    try:
        address, body = re.search(r"curl (\S+) .* -d '(.*)'$", said, re.MULTILINE).groups()
        answer = httpx.post(address, content=body, headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        _, alive = psutil.wait_procs(family, timeout=30)
        for left in alive:
            left.kill()
    assert not alive


def in_training(out: Path, process: psutil.Process) -> bool:
    return (out / "training" / "metrics.csv").exists() or (out / "training" / "hparams.json").exists()


def in_handoff(out: Path, process: psutil.Process) -> bool:
    return bool(list(out.glob(".tuned.*")) or (out / "tuned").exists())


def in_serving(out: Path, process: psutil.Process) -> bool:
    return any("servekit" in " ".join(child.cmdline()) for child in process.children(recursive=True))


def in_asking(out: Path, process: psutil.Process) -> bool:
    return all("ready" in (out / f"server-{name}.log").read_text() for name in ("base", "tuned")
               if (out / f"server-{name}.log").exists()) and (out / "server-tuned.log").exists()  # fmt: skip


def at_once(out: Path, process: psutil.Process) -> bool:
    return out.exists()


@pytest.mark.parametrize("phase", [at_once, in_training, in_handoff, in_serving, in_asking])
def test_control_c_at_any_phase_leaves_nothing_behind(model, tmp_path, phase):
    out = tmp_path / "out"
    process = start(model, out, steps=20 if phase in (at_once, in_training) else 2)
    watched = psutil.Process(process.pid)
    family: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + 120
        while not phase(out, watched):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = set(watched.children(recursive=True))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopped" in said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [p for p in alive if "servekit" in " ".join(p.cmdline())]
    assert not list(out.glob(".*"))
    if (out / "tuned").exists():
        verify(out / "tuned")
