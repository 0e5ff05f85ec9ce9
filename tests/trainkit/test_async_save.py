"""Checkpoints that are written while training goes on, damaged ones, and a disk that is full."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading

import pytest
import torch
from tests.trainkit.tiny import Regression, child_environment, loaders, trainer

from common_platform import errors
from trainkit import checkpoint
from trainkit.callbacks import Callback, ModelCheckpoint
from trainkit.checkpoint import AsyncCheckpointIO
from trainkit.checkpoint import io as checkpoint_io


def fitted(root, plugins, **settings):
    torch.manual_seed(5)
    module = Regression()
    keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit = trainer(root, max_epochs=1, callbacks=[keep], plugins=plugins, **settings)
    fit.fit(module, *loaders())
    return fit


def test_what_is_written_later_is_what_was_saved(tmp_path, monkeypatch):
    """The writer is held up, so that training has gone on long before a checkpoint reaches the disk."""
    fitted(tmp_path / "now", None)
    write, go_on = checkpoint_io.write, threading.Event()

    def slow_write(path, prepared):
        go_on.wait(0.05)
        write(path, prepared)

    monkeypatch.setattr(checkpoint_io, "write", slow_write)
    fitted(tmp_path / "later", AsyncCheckpointIO())
    names = sorted(path.name for path in (tmp_path / "now" / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "later" / "checkpoints").iterdir())
    assert len(names) == 8
    for name in names:
        one, other = (checkpoint.load(tmp_path / kind / "checkpoints" / name) for kind in ("now", "later"))
        for key, tensor in one[0].items():
            assert torch.equal(tensor, other[0][key])
        same(one[1]["optimizer_states"], other[1]["optimizer_states"])
        same(one[1]["ranks"], other[1]["ranks"])
    assert "checkpoint-writer" not in [thread.name for thread in threading.enumerate()]


def same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    write, reached = checkpoint_io.write, threading.Event()
    saved_at = []

    def write_once_training_went_on(path, prepared):
        assert reached.wait(20)
        saved_at.append(prepared.global_step)
        write(path, prepared)

    class Reaches(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                reached.set()

    monkeypatch.setattr(checkpoint_io, "write", write_once_training_went_on)
    keep = ModelCheckpoint(every_n_train_steps=3, save_top_k=1)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[Reaches(), keep], plugins=[AsyncCheckpointIO()])
    fit.fit(Regression(), *loaders())
    assert saved_at == [3, 6]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch=0-step=6.ckpt"]


def test_what_cannot_be_written_later_is_an_error_and_removes_nothing(tmp_path, monkeypatch):
    write = checkpoint_io.write

    def fails_at_six(path, prepared):
        if prepared.global_step == 6:
            raise errors.CheckpointWriteError("checkpoint", "step 6", "free space on the disk")
        write(path, prepared)

    monkeypatch.setattr(checkpoint_io, "write", fails_at_six)
    keep = ModelCheckpoint(every_n_train_steps=3, save_top_k=1)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[keep], plugins=[AsyncCheckpointIO()])
    with pytest.raises(errors.CheckpointWriteError, match="step 6"):
        fit.fit(Regression(), *loaders())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch=0-step=3.ckpt"]


FULL = """
import resource, sys
from pathlib import Path
from tests.trainkit.tiny import Regression, loaders, trainer
from trainkit.callbacks import Callback, ModelCheckpoint
from trainkit.checkpoint import AsyncCheckpointIO

class Fills(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=2)
plugins = [AsyncCheckpointIO()] if sys.argv[2] == "later" else None
fit = trainer(Path(sys.argv[1]), max_epochs=1, callbacks=[Fills(), keep], plugins=plugins, logger=False)
fit.fit(Regression(), *loaders())
"""


@pytest.mark.parametrize("when", ["now", "later"])
def test_a_disk_that_is_full_ends_the_run_and_leaves_the_last_checkpoint_whole(tmp_path, when):
    """The limit on a file's size stands for the disk: the write fails in the middle of a real file."""
    command = [sys.executable, "-c", FULL, str(tmp_path), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=child_environment(), check=False)
    assert done.returncode == 1
    assert "CheckpointWriteError" in done.stderr
    assert re.search("step [56]", done.stderr)  # the fifth may be on its way when the limit comes
    assert "bytes of free space" in done.stderr
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept in (
        ["epoch=0-step=4.ckpt", "epoch=0-step=5.ckpt"],
        ["epoch=0-step=3.ckpt", "epoch=0-step=4.ckpt"],
    )
    for name in kept:
        checkpoint.load(tmp_path / "checkpoints" / name)


def test_a_real_small_file_system_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by the administrator only")
    try:
        keep = ModelCheckpoint(disk / "kept", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(tmp_path, max_epochs=30, callbacks=[keep], logger=False)
        with pytest.raises(errors.CheckpointWriteError, match="free space"):
            fit.fit(Regression(width=64), *loaders())
        kept = list((disk / "kept").glob("*.ckpt"))
        assert kept
        for path in kept:
            checkpoint.load(path)
        assert not list((disk / "kept").glob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path / "file")])
    with pytest.raises(errors.CheckpointWriteError, match="a folder that can be written to.*dirpath"):
        fit.fit(Regression(), *loaders())


# --- damage ---


def run_of_three(root):
    torch.manual_seed(5)
    keep = ModelCheckpoint(root / "kept", every_n_train_steps=1, save_top_k=3)
    how = {"max_epochs": 2, "callbacks": [keep], "logger": False, "enable_progress_bar": False}
    return trainer(root, **how)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


FILES = ("model.safetensors", "state.safetensors", "state.json", "manifest.json")


def flips_are_refused(root, count, seed=7):
    """Each flip of the newest is refused by the name of a file, and the one before it is found with a warning."""
    fit = run_of_three(root)
    fit.fit(Regression(), *loaders())
    newest, before, _ = checkpoint.newest_first(root / "kept")
    draws = random.Random(seed)
    for number in range(count):
        path = newest / FILES[number % len(FILES)]
        bit = draws.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(errors.CheckpointError, match=r"model\.safe|state\.|manifest"):
            checkpoint.load_any(newest)
        with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
            found = run_of_three(root)._load("last-valid")
        assert found["global_step"] == 15, (path.name, bit)
        flip(path, bit)
        assert checkpoint.load(newest)[1]["global_step"] == 16
    assert before.is_dir()


def test_every_flipped_bit_is_refused_and_the_last_good_one_is_found(tmp_path):
    flips_are_refused(tmp_path, 40)


@pytest.mark.slow
def test_a_thousand_flipped_bits(tmp_path):
    flips_are_refused(tmp_path, 1000)


def test_a_run_goes_on_from_the_last_good_checkpoint(tmp_path):
    whole = run_of_three(tmp_path / "whole")
    module = Regression()
    whole.fit(module, *loaders())
    parts = run_of_three(tmp_path / "parts")
    parts.fit(Regression(), *loaders())
    newest, middle, oldest = checkpoint.newest_first(tmp_path / "parts" / "kept")
    flip(newest / "state.json", 100)
    (middle / "model.safetensors").write_bytes(b"")
    with pytest.raises(errors.CheckpointCorrupt, match="state.json"):
        run_of_three(tmp_path / "parts").fit(Regression(), *loaders(), ckpt_path="last")
    again, resumed = run_of_three(tmp_path / "parts"), Regression()
    with pytest.warns(UserWarning, match="is damaged") as warned:
        again.fit(resumed, *loaders(), ckpt_path="last-valid")
    assert len(warned) == 2
    assert again.ckpt_path == oldest
    for one, other in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_where_all_are_damaged_nothing_begins_anew(tmp_path):
    run_of_three(tmp_path).fit(Regression(), *loaders())
    for path in checkpoint.newest_first(tmp_path / "kept"):
        flip(path / "manifest.json", 40)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(errors.CheckpointCorrupt, match="manifest"):
        run_of_three(tmp_path).fit(Regression(), *loaders(), ckpt_path="last-valid")
    assert run_of_three(tmp_path / "new")._load("last-valid") is None
