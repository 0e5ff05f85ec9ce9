"""SIGTERM: a checkpoint, exit status 143, and a resumed run that is the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch
from tests.trainkit.tiny import child_environment

from trainkit import checkpoint

CHILD = """
import sys, time
from pathlib import Path
import torch
from tests.trainkit.tiny import Regression, loaders, trainer
from trainkit.callbacks import Callback, ModelCheckpoint

class Slow(Callback):
    def on_train_batch_end(self, trainer, *args):
        print(trainer.progress.total_batches, flush=True)
        time.sleep(float(sys.argv[2]))

torch.manual_seed(3)
module = Regression()
fit = trainer(Path(sys.argv[1]), max_epochs=3, accumulate_grad_batches=3, callbacks=[Slow(), ModelCheckpoint()])
fit.fit(module, *loaders(), ckpt_path="last")
fit.save_checkpoint(Path(sys.argv[1]) / "end")
"""


def run(root, pause: float, *, kill_at: int | None = None) -> int:
    command = [sys.executable, "-c", CHILD, str(root), str(pause)]
    environment = child_environment(OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        for line in process.stdout:
            if kill_at is not None and int(line) >= kill_at:
                process.send_signal(signal.SIGTERM)
                kill_at = None
        return process.wait(60)
    finally:
        process.kill()
        process.stdout.close()


def test_sigterm_saves_in_the_middle_of_an_epoch_and_exits_with_143(tmp_path):
    assert run(tmp_path / "whole", 0.0) == 0
    assert run(tmp_path / "parts", 0.2, kill_at=5) == 143
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.ckpt")[1]
    assert saved["loops"]["progress"]["batch"] in (5, 6)
    assert run(tmp_path / "parts", 0.0) == 0
    one, other = (checkpoint.load(tmp_path / name / "end") for name in ("whole", "parts"))
    assert one[1]["global_step"] == other[1]["global_step"] == 9
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name])


WAITS = """
import sys, time
from pathlib import Path
from tests.trainkit.tiny import Regression, loaders, trainer
from trainkit.callbacks import Callback, ModelCheckpoint

class Slow(Callback):
    def on_train_batch_end(self, trainer, *args):
        print(trainer.progress.total_batches, flush=True)
        time.sleep(0.1)

fit = trainer(Path(sys.argv[1]), max_epochs=2, callbacks=[Slow(), ModelCheckpoint(every_n_epochs=9)])
fit.fit(Regression(), *loaders())
print("resumed from", fit.ckpt_path, flush=True)
"""


def signalled(root, environment, at: int = 3):
    """What a run that is sent SIGUSR1 prints, and how it ends."""
    command = [sys.executable, "-c", WAITS, str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.strip() == str(at):
                process.send_signal(signal.SIGUSR1)
        return process.wait(60), lines, process.stderr.read()
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_sigusr1_saves_and_goes_on(tmp_path):
    status, lines, _ = signalled(tmp_path, child_environment(OMP_NUM_THREADS="1"))
    assert status == 0
    assert "16" in lines
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.ckpt")[1]
    assert saved["global_step"] in (3, 4, 5)


def test_a_job_of_slurm_is_requeued_and_goes_on(tmp_path):
    """A program of the scheduler's name writes down what it was asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (programs / "scontrol").chmod(0o755)
    job = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}
    environment = child_environment(OMP_NUM_THREADS="1", SLURM_JOB_ID="77", **job)
    status, lines, _ = signalled(tmp_path / "run", environment)
    assert status == 143
    assert (tmp_path / "asked").read_text() == "requeue 41_2\n"
    stopped_at = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.ckpt")[1]["global_step"]
    assert lines[-1] == str(stopped_at)
    status, lines, _ = signalled(tmp_path / "run", environment | {"SLURM_RESTART_COUNT": "1"}, at=-1)
    assert status == 0
    assert lines[0] == str(stopped_at + 1)
    assert lines[-1].endswith("last.ckpt")


def test_a_scheduler_that_refuses_is_named(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 'requeue is off' >&2\nexit 1\n")
    (programs / "scontrol").chmod(0o755)
    environment = child_environment(OMP_NUM_THREADS="1", SLURM_JOB_ID="77", PATH=f"{programs}:{os.environ['PATH']}")
    status, _, err = signalled(tmp_path / "run", environment)
    assert status == 1
    assert "ResourceError" in err
    assert "requeue is off" in err
    checkpoint.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
