"""SIGTERM: a checkpoint, exit status 143, and a resumed run that is the run."""

from __future__ import annotations

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
