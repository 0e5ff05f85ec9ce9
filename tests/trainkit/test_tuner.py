"""Searches find what Lightning's find, leave no trace, and survive what does not fit into memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, child_environment, dataset, loaders, trainer
from torch.utils.data import DataLoader

import trainkit
from common_platform import errors
from trainkit.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from trainkit.tuner import Tuner
from trainkit.tuner.batch_size import is_out_of_memory, largest
from trainkit.tuner.lr_finder import LRFinder

SCRIPT = Path(__file__).parent / "parity" / "lr_find.py"
LIGHTNING = Path(__file__).parents[2] / ".peers" / "lightning" / "bin" / "python"


def run(python: Path | str, library: str, folder: Path) -> dict:
    command = [str(python), str(SCRIPT), library, str(folder)]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_curves_and_suggestions_are_lightnings(tmp_path):
    if not LIGHTNING.exists():
        pytest.skip("no environment of Lightning: nox -s peers -- lightning")
    ours, theirs = run(sys.executable, "trainkit", tmp_path / "a"), run(LIGHTNING, "lightning", tmp_path / "b")
    for case, found in ours.items():
        assert found["same"]
        assert found["suggestion"] == pytest.approx(theirs[case]["suggestion"])
        assert found["lr"] == pytest.approx(theirs[case]["lr"])
        for name in ("lr", "loss"):
            mine = found["results"][name]
            assert mine == pytest.approx(theirs[case]["results"][name][: len(mine)], rel=1e-5), (case, name)


def state_of(fit, module):
    return [
        *(p.detach().clone() for p in module.state_dict().values()),
        torch.get_rng_state(),
        torch.tensor([fit.global_step, fit.current_epoch]),
    ]


def test_a_search_leaves_no_trace(tmp_path):
    torch.manual_seed(0)
    fit, module = trainer(tmp_path, max_epochs=1), Regression()
    before = state_of(fit, module)
    found = Tuner(fit).lr_find(module, *loaders(), num_training=20, update_attr=False)
    for one, other in zip(state_of(fit, module), before, strict=True):
        assert torch.equal(one, other)
    assert len(found.results["lr"]) == 20
    assert not list((tmp_path / "checkpoints").glob("*"))
    fit.fit(module, *loaders())
    assert fit.global_step == 8


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    finder = LRFinder("exponential", 1e-4, 1.0, 30)
    finder.results = {"lr": [finder.rate(n) for n in range(30)], "loss": [abs(n - 20) + 1.0 for n in range(30)]}
    finder.plot(suggest=True, path=tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert finder.rate(0) == 1e-4
    assert finder.rate(29) == pytest.approx(1.0)


class Data(trainkit.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.setups: list[str] = []

    def setup(self, stage):
        self.setups.append(stage)

    def train_dataloader(self):
        return DataLoader(dataset(), self.hparams.batch_size)


def too_large_from(size: int, error: Exception):
    class Model(Regression):
        largest = 0

        def training_step(self, batch, batch_idx):
            if len(batch[0]) >= size:
                raise error
            type(self).largest = max(self.largest, len(batch[0]))
            return super().training_step(batch, batch_idx)

    return Model()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize(("mode", "wanted"), [("power", 16), ("binsearch", 22)])
def test_what_does_not_fit_is_found_and_survived(tmp_path, mode, wanted, error):
    fit, module, data = trainer(tmp_path, max_epochs=1), too_large_from(23, error), Data()
    before = state_of(fit, module)
    found = Tuner(fit).scale_batch_size(module, datamodule=data, mode=mode, margin=0.0)
    assert found == data.hparams.batch_size == wanted
    for one, other in zip(state_of(fit, module), before, strict=True):
        assert torch.equal(one, other)


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path):
    data = Data()
    with pytest.raises(errors.UserCodeError, match="ValueError"):
        Tuner(trainer(tmp_path)).scale_batch_size(too_large_from(8, ValueError("no")), datamodule=data)
    assert data.hparams.batch_size == 4
    assert not is_out_of_memory(ValueError("out of memory"))


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([64, 255, 256]))
def test_binary_search_finds_the_largest_that_fits(limit, first, most):
    assert largest(lambda size: size <= limit, "binsearch", first, 100, most) == min(limit, most)
    power = largest(lambda size: size <= limit, "power", first, 100, most)
    assert power <= min(limit, most) <= 2 * power  # halves of odd sizes are rounded down


def test_nothing_fits():
    with pytest.raises(errors.ConfigError, match="not even the smallest"):
        largest(lambda size: False, "power", 8, 100, 64)


def test_the_finders_run_when_a_fit_begins(tmp_path):
    class Watches(Callback):
        def on_train_start(self, trainer, pl_module):
            self.rate, self.weights = trainer.learning_rate, [p.detach().clone() for p in pl_module.parameters()]
            self.batches = trainer.num_training_batches

    watches, module, data = Watches(), too_large_from(17, MemoryError()), Data()
    before = [p.detach().clone() for p in module.parameters()]
    finders = [BatchSizeFinder(max_val=64), LearningRateFinder(num_training_steps=30, min_lr=1e-4)]
    fit = trainer(tmp_path, max_epochs=1, callbacks=[*finders, watches])
    fit.fit(module, datamodule=data)
    assert data.hparams.batch_size == 16
    assert watches.batches == 4
    assert module.hparams["lr"] == watches.rate == finders[1].optimal_lr.suggestion() != 1e-2
    assert data.setups == ["fit"]
    for one, other in zip(watches.weights, before, strict=True):
        assert torch.equal(one, other)
    assert fit.global_step == 4


def test_workers_are_measured_and_set(tmp_path):
    class Workers(Data):
        num_workers = 0

    data = Workers()
    found = Tuner(trainer(tmp_path)).scale_num_workers(Regression(), data, candidates=[0, 1], seconds=0.2)
    assert found == data.num_workers
    assert found in (0, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.lr_find(Regression(), mode="steep"), "mode.*steep"),
        (lambda t: t.lr_find(Regression(), min_lr=1.0, max_lr=0.1), "min_lr"),
        (lambda t: t.lr_find(Regression(), num_training=1), "num_training"),
        (lambda t: t.lr_find(Regression(), attr_name="speed"), "speed"),
        (lambda t: t.scale_batch_size(Regression(), loaders()[0]), "a loader.*data module"),
        (lambda t: t.scale_batch_size(Regression(), datamodule=Data(), batch_arg_name="size"), "size"),
        (lambda t: t.scale_batch_size(Regression(), datamodule=Data(), mode="up"), "mode.*up"),
        (lambda t: t.scale_batch_size(Regression(), datamodule=Data(), margin=1.0), "margin"),
        (lambda t: t.scale_batch_size(Regression(), datamodule=Data(), method="eat"), "method"),
    ],
)
def test_wrong_searches_are_refused(tmp_path, call, says):
    with pytest.raises(errors.ConfigError, match=says):
        call(Tuner(trainer(tmp_path)))
