"""Kill a run at random moments, again and again, and go on: ``python kill_program.py FOLDER KILLS SEED HOW``.

Each run is a fork of this process, so that a kill costs no start of an interpreter. HOW is "now" or "later": how
checkpoints are written. Prints what was found, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from tests.trainkit.tiny import Regression, loaders, trainer

from trainkit import checkpoint
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.checkpoint import AsyncCheckpointIO, CheckpointIO

ROOT, KILLS, SEED, HOW = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


def run(root: Path) -> None:
    """A whole run, or the rest of one; at the end its state is at ``root/end``."""
    torch.manual_seed(3)
    module = Regression()
    keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=2)
    early = EarlyStopping("val_loss", patience=20, restore_best=True)
    way = AsyncCheckpointIO() if HOW == "later" else CheckpointIO()
    how = {"max_epochs": 2, "limit_val_batches": 2, "val_check_interval": 4, "accumulate_grad_batches": 2}
    fit = trainer(root, callbacks=[early, keep], plugins=[way], **how)
    fit.loggers[0]._folder = root / "log"
    fit.fit(module, *loaders(), ckpt_path="last")
    fit.save_checkpoint(root / "end")
    fit.checkpoint_io.wait()


def forked(root: Path, kill_after_s: float | None) -> bool:
    """Whether the run came to its end."""
    child = os.fork()
    if child == 0:
        warnings.simplefilter("ignore")
        try:
            run(root)
        except BaseException as error:  # noqa: BLE001 - the parent is told by the status
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a run failed by itself: {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def the_end_of(root: Path) -> tuple[dict, list, str]:
    weights, state = checkpoint.load(root / "end")
    return weights, state["optimizer_states"], (root / "log" / "metrics.csv").read_text()


def is_same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(is_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def main() -> None:
    torch.set_num_threads(1)
    draws = random.Random(SEED)
    forked(ROOT / "whole", None)
    began = time.monotonic()
    forked(ROOT / "again", None)
    lasts = time.monotonic() - began
    whole = the_end_of(ROOT / "whole")
    found = {"kills": 0, "ends": 0, "unequal": 0, "unreadable": 0, "backwards": 0, "debris": 0}
    while found["kills"] < KILLS:
        root, step, ended = ROOT / f"run{found['ends']}", -1, False
        while not ended:
            enough = found["kills"] >= KILLS
            ended = forked(root, None if enough else draws.uniform(0, 0.7 * lasts))
            found["kills"] += not ended
            try:
                newest = checkpoint.find_last(root / "checkpoints")
                now = -1 if newest is None else checkpoint.load(newest)[1]["global_step"]
            except Exception:
                found["unreadable"] += 1
                raise
            found["backwards"] += now < step
            step = now
        found["ends"] += 1
        found["unequal"] += not is_same(the_end_of(root), whole)
        found["debris"] += len(list((root / "checkpoints").glob(".*")))
        shutil.rmtree(root)
        print(json.dumps(found), file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
