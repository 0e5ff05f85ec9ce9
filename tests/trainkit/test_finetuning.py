"""Layers that are frozen first and trained later, also after a resume."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tests.trainkit.tiny import dataset, trainer
from torch import nn
from torch.utils.data import DataLoader

import trainkit
from common_platform import errors
from trainkit.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint


class Model(trainkit.TrainModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return (self.head(self.backbone(batch[0])) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters(), lr=0.01)


class Rates(Callback):
    """The rates of all groups, and whether the backbone's first layer changed, by epoch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.moved: list[bool] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = pl_module.backbone[0].weight.detach().clone()

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        self.moved.append(not torch.equal(self.before, pl_module.backbone[0].weight))


def loader():
    return DataLoader(dataset(24), 8, shuffle=True)


def test_the_backbone_is_trained_from_its_epoch_on_at_a_rate_that_grows(tmp_path):
    rates = Rates()
    tune = BackboneFinetuning(2, lambda_func=lambda epoch: 3.0, backbone_initial_ratio_lr=0.2)
    trainer(tmp_path, max_epochs=6, callbacks=[tune, rates]).fit(Model(), loader())
    assert rates.moved == [False, False, True, True, True, True]
    wanted = [[0.01], [0.01], [0.01, 0.002], [0.01, 0.006], [0.01, 0.01], [0.01, 0.01]]
    for found, expected in zip(rates.rates, wanted, strict=True):
        assert found == pytest.approx(expected)


class Stops(Callback):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.progress.total_batches == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [2, 5, 6, 7, 10, 13])
def test_a_resumed_run_is_the_run(tmp_path, stop):
    def weights(root, stop=None, resume=False):
        torch.manual_seed(1)
        module = Model()
        callbacks = [BackboneFinetuning(2), Stops(stop), ModelCheckpoint(root, every_n_train_steps=1)]
        fit = trainer(root, max_epochs=5, callbacks=callbacks, logger=False)
        with contextlib.suppress(KeyboardInterrupt):
            fit.fit(module, loader(), ckpt_path="last" if resume else None)
        return module.state_dict()

    whole = weights(tmp_path / "whole")
    weights(tmp_path / "parts", stop)
    resumed = weights(tmp_path / "parts", resume=True)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_what_is_frozen_and_what_is_left_to_batch_norms():
    module = Model()
    BaseFinetuning.freeze(module.backbone, train_bn=True)
    assert [p.requires_grad for p in module.backbone.parameters()] == [False, False, True, True]
    BaseFinetuning.freeze(module.backbone, train_bn=False)
    assert not any(p.requires_grad for p in module.backbone.parameters())
    assert not module.backbone[1].track_running_stats
    BaseFinetuning.make_trainable([module.backbone])
    assert len(list(BaseFinetuning.filter_params(module.backbone, train_bn=False))) == 2
    optimizer = module.configure_optimizers()
    with pytest.warns(UserWarning, match="in the optimizer already"):
        BaseFinetuning.unfreeze_and_add_param_group(module, optimizer, train_bn=True)
    assert len(optimizer.param_groups[1]["params"]) == 4
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.001)


def test_a_module_without_a_backbone_is_refused(tmp_path):
    class Other(Model):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = None

    with pytest.raises(errors.ConfigError, match="Other without a backbone"):
        trainer(tmp_path, max_epochs=1, callbacks=[BackboneFinetuning()]).fit(Other(), loader())
