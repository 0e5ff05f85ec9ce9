"""SIGTERM: a checkpoint, exit status 143, and a resumed run that is the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch
from tests.trainkit.tiny import child_environment

from trainkit import checkpoint

WAITS = """
import sys, time
from pathlib import Path
import torch
from tests.trainkit.tiny import Regression, loaders, trainer
from trainkit.callbacks import Callback, ModelCheckpoint

AT = int(sys.argv[2])  # the batch after which the signal is waited for; 0: none

class Waits(Callback):
    def on_train_batch_end(self, trainer, *args):
        print(trainer.progress.total_batches, flush=True)
        until = time.monotonic() + 100
        while trainer.progress.total_batches == AT and not trainer.interruption.is_wished and time.monotonic() < until:
            time.sleep(0.01)
"""
CHILD = f"""{WAITS}
torch.manual_seed(3)
module = Regression()
fit = trainer(Path(sys.argv[1]), max_epochs=3, accumulate_grad_batches=3, callbacks=[Waits(), ModelCheckpoint()])
fit.fit(module, *loaders(), ckpt_path="last")
fit.save_checkpoint(Path(sys.argv[1]) / "end")
"""
REQUEUED = f"""{WAITS}
fit = trainer(Path(sys.argv[1]), max_epochs=2, callbacks=[Waits(), ModelCheckpoint(every_n_epochs=9)])
fit.fit(Regression(), *loaders())
print("resumed from", fit.ckpt_path, flush=True)
"""


def run(program: str, root, number: signal.Signals, at: int, **more: str) -> tuple[int, list[str], str]:
    """How a run ends that is sent a signal after batch ``at``, what it prints, and its errors."""
    command = [sys.executable, "-c", program, str(root), str(at)]
    environment = child_environment(OMP_NUM_THREADS="1", **more)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if at and line.strip() == str(at):
                process.send_signal(number)
        return process.wait(100), lines, process.stderr.read()
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_sigterm_saves_in_the_middle_of_an_epoch_and_exits_with_143(tmp_path):
    assert run(CHILD, tmp_path / "whole", signal.SIGTERM, 0)[0] == 0
    assert run(CHILD, tmp_path / "parts", signal.SIGTERM, 5)[0] == 143
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.ckpt")[1]
    assert saved["loops"]["progress"]["batch"] == 5
    assert run(CHILD, tmp_path / "parts", signal.SIGTERM, 0)[0] == 0
    one, other = (checkpoint.load(tmp_path / name / "end") for name in ("whole", "parts"))
    assert one[1]["global_step"] == other[1]["global_step"] == 9
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name])


def test_sigusr1_saves_and_goes_on(tmp_path):
    status, lines, _ = run(REQUEUED, tmp_path, signal.SIGUSR1, 3)
    assert status == 0
    assert "16" in lines
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.ckpt")[1]
    assert saved["global_step"] == 3


def test_a_job_of_slurm_is_requeued_and_goes_on(tmp_path):
    """A program of the scheduler's name writes down what it was asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (programs / "scontrol").chmod(0o755)
    job = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}
    job |= {"SLURM_JOB_ID": "77"}
    status, lines, _ = run(REQUEUED, tmp_path / "run", signal.SIGUSR1, 3, **job)
    assert status == 143
    assert (tmp_path / "asked").read_text() == "requeue 41_2\n"
    stopped_at = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.ckpt")[1]["global_step"]
    assert lines[-1] == str(stopped_at) == "3"
    status, lines, _ = run(REQUEUED, tmp_path / "run", signal.SIGUSR1, 0, **job, SLURM_RESTART_COUNT="1")
    assert status == 0
    assert lines[0] == str(stopped_at + 1)
    assert lines[-1].endswith("last.ckpt")


def test_a_scheduler_that_refuses_is_named(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 'requeue is off' >&2\nexit 1\n")
    (programs / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "PATH": f"{programs}:{os.environ['PATH']}"}
    status, _, err = run(REQUEUED, tmp_path / "run", signal.SIGUSR1, 3, **job)
    assert status == 1
    assert "ResourceError" in err
    assert "requeue is off" in err
    checkpoint.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
