"""A run that is stopped anywhere, once or often, and resumed, is the run: weights, optimizer, log, metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, dataset, trainer
from torch.utils.data import DataLoader, IterableDataset

from trainkit.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint

HOOKS = [
    "on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_epoch_start",
]  # fmt: skip


class Stop(Exception):
    """Stands for a kill."""


class StopsAt(Callback):
    """Raises when a hook is called for the n-th time."""

    def __init__(self, hook: str, count: int) -> None:
        self.left = count
        setattr(self, hook, self._called)

    def _called(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Stream(IterableDataset):
    """Does not tell its length, and draws random numbers."""

    def __iter__(self):
        for x, y in zip(*dataset(30).tensors, strict=True):
            yield x + 0.01 * torch.randn(4), y


class Model(Regression):
    """Random transforms, a mean over the epoch, a scheduler that watches it."""

    def training_step(self, batch, batch_idx):
        loss = self.loss((batch[0] + 0.01 * torch.randn_like(batch[0]), batch[1]))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        steps = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [
            {"scheduler": plateau, "monitor": "val_loss"},
            {"scheduler": steps, "interval": "step"},
        ]


def loader(kind: str) -> DataLoader:
    if kind == "stream":
        return DataLoader(Stream(), 4)
    return DataLoader(dataset(30), 4, shuffle=True)


def run(root: Path, kind: str, how: dict, stop: tuple[str, int] | None = None, *, resume: bool = False) -> tuple | None:
    torch.manual_seed(3)
    module = Model()
    early = EarlyStopping("val_loss", patience=20, restore_best=True)
    callbacks = [early, LearningRateMonitor(), *([StopsAt(*stop)] if stop else [])]
    keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=1)
    fit = trainer(root, max_epochs=2, callbacks=[*callbacks, keep], **how)
    fit.loggers[0]._folder = root / "log"
    try:
        fit.fit(module, loader(kind), DataLoader(dataset(12, 1), 4), ckpt_path="last" if resume else None)
    except KeyboardInterrupt:
        return None
    optimizer = [p for state in fit.optimizer.state.values() for p in state.values()]
    numbers = {name: value.item() for name, value in fit.callback_metrics.items()}
    state = [*module.state_dict().values(), *optimizer, early.best_score, torch.get_rng_state()]
    return state, numbers, fit.learning_rate, fit.global_step, (root / "log" / "metrics.csv").read_text()


HOW = [
    {"accumulate_grad_batches": 3},
    {"val_check_interval": 3},
    {"accumulate_grad_batches": 2, "val_check_interval": 3, "gradient_clip_val": 0.1, "log_every_n_steps": 2},
]
WHOLE: dict[tuple, tuple] = {}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["shuffled", "stream"]),
    which=st.integers(0, len(HOW) - 1),
    stops=st.lists(st.tuples(st.sampled_from(HOOKS), st.integers(0, 14)), min_size=1, max_size=3),
)
def test_wherever_it_is_stopped_the_rest_is_the_same(tmp_path_factory, kind, which, stops):
    how = HOW[which] if kind == "shuffled" else {k: v for k, v in HOW[which].items() if k != "val_check_interval"}
    if (kind, which) not in WHOLE:
        WHOLE[kind, which] = run(tmp_path_factory.mktemp("whole"), kind, how)
    root = tmp_path_factory.mktemp("parts")
    found = run(root, kind, how, stops[0])
    for stop in [*stops[1:], None]:
        if found is None:
            found = run(root, kind, how, stop, resume=True)
    tensors, *rest = found
    wanted, *wanted_rest = WHOLE[kind, which]
    assert rest == wanted_rest
    for one, other in zip(tensors, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_in_the_middle_of_a_group_keeps_its_gradients(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.progress.total_batches == 5:
                trainer.save_checkpoint(tmp_path / "middle")

    def weights(callbacks, ckpt_path=None):
        torch.manual_seed(3)
        module = Model()
        how = {"accumulate_grad_batches": 3, "max_epochs": 2, "callbacks": callbacks, "enable_checkpointing": False}
        trainer(tmp_path, **how).fit(module, loader("shuffled"), DataLoader(dataset(12, 1), 4), ckpt_path=ckpt_path)
        return module.state_dict()

    whole, resumed = weights([Saves()]), weights([], tmp_path / "middle")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name])


@pytest.mark.parametrize("at", [2, 5, 8])
def test_metrics_of_torchmetrics_go_on_where_they_stood(tmp_path, at):
    torchmetrics = pytest.importorskip("torchmetrics")

    class WithMetric(Model):
        def __init__(self):
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch, batch_idx):
            self.error(self.net(batch[0]), batch[1])
            self.log("error", self.error, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.progress.total_batches == at:
                trainer.save_checkpoint(tmp_path / "middle")

    def error(callbacks, ckpt_path=None):
        torch.manual_seed(3)
        fit = trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=False)
        fit.fit(WithMetric(), loader("shuffled"), DataLoader(dataset(12, 1), 4), ckpt_path=ckpt_path)
        return fit.callback_metrics["error_epoch"]

    assert torch.equal(error([Saves()]), error([], tmp_path / "middle"))
