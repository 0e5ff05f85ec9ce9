"""Training: the order of hooks, the right averages, and a clean end."""

from __future__ import annotations

import csv
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, dataset, loaders, trainer
from torch.utils.data import DataLoader

from common_platform.errors import ConfigError, NonFiniteLoss
from trainkit.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint


class Weighted(Regression):
    """A batch is (x, y) of any length; the loss is a mean over its rows, and counts as many times."""

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "weight": len(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7), group=st.integers(1, 4))
def test_accumulated_uneven_batches_step_like_one_big_batch(tmp_path_factory, sizes, group):
    root = tmp_path_factory.mktemp("runs")
    data = dataset(sum(sizes))
    batches, first = [], 0
    for size in sizes:
        batches.append(tuple(t[first : first + size] for t in data.tensors))
        first += size
    merged = [batches[i : i + group] for i in range(0, len(batches), group)]
    big = [tuple(torch.cat([b[k] for b in group_]) for k in (0, 1)) for group_ in merged]
    results = []
    for loader, accumulate in ((batches, group), (big, 1)):
        torch.manual_seed(0)
        module = Weighted(dropout=0.0)
        fit = trainer(root, max_epochs=1, accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False)
        fit.fit(module, loader)
        assert fit.global_step == len(merged)
        results.append([p.detach() for p in module.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.01), ("value", 0.001)])
def test_gradients_are_clipped(tmp_path, algorithm, limit):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
            seen.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))

    train, _ = loaders()
    fit = trainer(tmp_path, max_steps=3, gradient_clip_val=limit, gradient_clip_algorithm=algorithm, callbacks=[Look()])
    fit.fit(Regression(), train)
    assert len(seen) == 3
    assert max(seen) <= limit * 1.0001


def test_early_stopping_puts_the_best_weights_back(tmp_path):
    class Worse(Regression):
        """Gets worse by 1 each validation after the second."""

        def __init__(self):
            super().__init__(dropout=0.0)
            self.scores = iter([5.0, 1.0, 2.0, 3.0, 4.0, 5.0])
            self.at = []

        def on_validation_epoch_end(self):
            self.log("score", next(self.scores))
            self.at.append([p.detach().clone() for p in self.parameters()])

    module = Worse()
    train, val = loaders()
    stop = EarlyStopping("score", patience=2, restore_best=True)
    fit = trainer(tmp_path, max_epochs=50, callbacks=[stop])
    fit.fit(module, train, val)
    assert len(module.at) == 4
    assert fit.current_epoch == 4
    assert (stop.best_score, stop.wait_count) == (1.0, 2)
    for now, best in zip(module.parameters(), module.at[1], strict=True):
        assert torch.equal(now, best)


def test_a_metric_that_nobody_logs_is_named(tmp_path):
    train, val = loaders()
    with pytest.raises(ConfigError, match="val_acc.*val_loss"):
        trainer(tmp_path, max_epochs=1, callbacks=[EarlyStopping("val_acc")]).fit(Regression(), train, val)


def test_a_loss_that_is_not_finite_names_step_and_batch(tmp_path):
    class Broken(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (float("nan") if batch_idx == 3 else 1.0)

    with pytest.raises(NonFiniteLoss, match="step 3, batch 3"):
        trainer(tmp_path, max_epochs=1).fit(Broken(), loaders()[0])


def test_means_are_weighted_and_rows_are_logged(tmp_path):
    class Logs(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("mean", float(batch_idx), weight=[1, 2, 3][batch_idx])

    train, val = loaders()
    fit = trainer(tmp_path, max_epochs=2, callbacks=[LearningRateMonitor()])
    fit.fit(Logs(), train, val)
    assert fit.callback_metrics["mean"] == pytest.approx((0 + 2 + 6) / 6)
    with Path(fit.logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == list(range(16))
    assert [float(row["mean"]) for row in rows if row["mean"]] == pytest.approx([8 / 6, 8 / 6])
    assert float([row["lr-AdamW"] for row in rows if row["lr-AdamW"]][-1]) == pytest.approx(0.01 * 0.9)


@pytest.mark.parametrize(
    ("settings_", "steps", "validations"),
    [
        ({"max_epochs": 3}, 24, 3),
        ({"max_steps": 5}, 5, 0),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 2),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, 4, 1),
        ({"max_epochs": 1, "val_check_interval": 2}, 8, 4),
        ({"max_epochs": 1, "val_check_interval": 3}, 8, 2),
        ({"max_epochs": 2, "val_check_interval": 5, "check_val_every_n_epoch": None}, 16, 3),
        ({"max_epochs": 1, "overfit_batches": 2}, 2, 1),
        ({"fast_dev_run": 3}, 3, 1),
        ({"max_epochs": 1, "val_check_interval": 0.25}, 8, 4),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, 32, 2),
        ({"max_epochs": 2, "limit_val_batches": 0}, 16, 0),
        ({"max_epochs": 1, "accumulate_grad_batches": 3}, 3, 1),
        ({"max_epochs": 0}, 0, 0),
    ],
)
def test_limits(tmp_path, settings_, steps, validations):
    counted = []

    class Count(Callback):
        def on_validation_end(self, trainer, module):
            counted.append(trainer.global_step)

    train, val = loaders()
    fit = trainer(tmp_path, callbacks=[Count()], **settings_)
    fit.fit(Regression(), train, val)
    assert (fit.global_step, len(counted)) == (steps, validations)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed", 32, "bf16"])
def test_precisions_train(tmp_path, precision):
    class Cast(Regression):
        def loss(self, batch):
            dtype = next(self.parameters()).dtype
            x, y = (t.to(dtype) for t in batch)
            return ((self.net(x) - y) ** 2).float().mean()

    torch.manual_seed(0)
    module = Cast(lr=0.02, dropout=0.0)
    train, val = loaders()
    fit = trainer(tmp_path, max_epochs=8, precision=precision)
    before = fit.validate(module, val)[0]["val_loss"]
    fit.fit(module, train, val)
    assert fit.callback_metrics["val_loss"] < 0.8 * before


def test_what_configure_optimizers_must_return_is_said(tmp_path):
    class Wrong(Regression):
        def configure_optimizers(self):
            return "adam"

    with pytest.raises(ConfigError, match="configure_optimizers.*str.*an optimizer"):
        trainer(tmp_path, max_epochs=1).fit(Wrong(), loaders()[0])


def test_plateau_scheduler_follows_its_metric(tmp_path):
    class Plateau(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("flat", 1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "flat"}}

    train, val = loaders()
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(Plateau(lr=1e-3), train, val)
    assert fit.learning_rate == 0.25


def test_top_k_checkpoints_keep_the_best(tmp_path):
    class Scores(Regression):
        def on_validation_epoch_end(self):
            self.log("score", [3.0, 1.0, 2.0, 5.0][self.current_epoch])

    train, val = loaders()
    keep = ModelCheckpoint(monitor="score", save_top_k=2, filename="{epoch}-{score:.1f}")
    trainer(tmp_path, max_epochs=4, callbacks=[keep]).fit(Scores(), train, val)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "epoch=1-score=1.0.ckpt",
        "epoch=2-score=2.0.ckpt",
    ]
    assert Path(keep.best_model_path).name == "epoch=1-score=1.0.ckpt"
    assert keep.best_model_score == 1.0


def test_a_loader_that_is_any_iterable_works(tmp_path):
    x, y = dataset(8).tensors
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(Regression(), [(x[:4], y[:4]), (x[4:], y[4:])], iter([(x, y)]))
    assert fit.global_step == 2


def test_worker_processes_give_the_same_batches(tmp_path):
    weights = []
    for workers in (0, 2):
        torch.manual_seed(0)
        module = Regression(dropout=0.0)
        loader = DataLoader(dataset(), 8, shuffle=True, num_workers=workers)
        torch.manual_seed(7)
        trainer(tmp_path, max_epochs=1).fit(module, loader)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_loaders_are_asked_for_again_and_a_resumed_run_asks_when_the_whole_one_does(tmp_path):
    class Growing(Regression):
        """Each time it is asked it gives another batch more."""

        def __init__(self):
            super().__init__(dropout=0.0)
            self.asked, self.seen = {"train": [], "val": []}, []

        def train_dataloader(self):
            self.asked["train"].append(self.current_epoch)
            return DataLoader(dataset(8 * len(self.asked["train"])), 8)

        def val_dataloader(self):
            self.asked["val"].append(self.current_epoch)
            return DataLoader(dataset(8, 1), 8)

        def on_train_batch_start(self, batch, batch_idx):
            self.seen.append(self.current_epoch)

    module = Growing()
    trainer(tmp_path, max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(module)
    assert module.asked == {"train": [0, 2, 4], "val": [0, 2, 4]}
    assert [module.seen.count(epoch) for epoch in range(5)] == [1, 1, 2, 2, 3]

    trainer(tmp_path / "first", max_epochs=3, reload_dataloaders_every_n_epochs=2).fit(Growing())
    resumed = Growing()
    last = tmp_path / "first" / "checkpoints" / "epoch=2-step=4.ckpt"
    trainer(tmp_path / "second", max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(resumed, ckpt_path=last)
    assert resumed.asked["train"] == [3, 4]


@pytest.mark.parametrize("interval", ["00:00:00:01", "00:00:01", timedelta(seconds=1), {"seconds": 1}])
def test_validation_comes_by_time(tmp_path, monkeypatch, interval):
    now = [0.0]
    monkeypatch.setattr("trainkit.loop.fit.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            now[0] += 0.4

        def on_validation_start(self):
            self.validated_at.append(self.trainer.progress.total_batches)

    module = Slow()
    module.validated_at = []
    trainer(tmp_path, max_epochs=2, val_check_interval=interval).fit(module, *loaders())
    assert module.validated_at == [3, 6, 9, 12, 15]
