"""A loop of one's own through the Runtime is the plain loop, in every precision, and goes on from what it saved."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.trainkit.tiny import dataset
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common_platform.errors import CheckpointError, ConfigError
from trainkit import Runtime


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(runtime, model, optimizer, scheduler, steps: int) -> None:
    loader = runtime.setup_dataloaders(DataLoader(dataset(), 8))
    for _, (x, y) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        runtime.backward(F.mse_loss(model(x).float(), y))
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()


def parts(precision: str):
    runtime = Runtime(accelerator="cpu", precision=precision)
    runtime.launch()
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer = runtime.setup(model, optimizer)
    return runtime, model, optimizer, scheduler


def test_it_is_the_plain_loop():
    runtime, model, optimizer, scheduler = parts("32-true")
    train(runtime, model, optimizer, scheduler, 6)
    plain = net()
    steps = torch.optim.AdamW(plain.parameters(), lr=0.01)
    rates = torch.optim.lr_scheduler.ExponentialLR(steps, 0.9)
    for _, (x, y) in zip(range(6), DataLoader(dataset(), 8), strict=False):
        steps.zero_grad()
        F.mse_loss(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        steps.step()
        rates.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")  # the first float16 step overflows
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_it_goes_on_exactly_from_what_it_saved(tmp_path, precision):
    runtime, model, optimizer, scheduler = parts(precision)
    train(runtime, model, optimizer, scheduler, 4)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "done": 4, "note": "half way"}
    runtime.save(tmp_path / "half", state)
    before = copy.deepcopy(model.module.state_dict())
    train(runtime, model, optimizer, scheduler, 3)
    wanted = list(model.parameters())
    again, model2, optimizer2, scheduler2 = parts(precision)
    resumed = {"model": model2, "optimizer": optimizer2, "scheduler": scheduler2, "done": 0}
    rest = again.load(tmp_path / "half", resumed)
    assert (resumed["done"], rest) == (4, {"note": "half way"})
    for name, tensor in model2.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    train(again, model2, optimizer2, scheduler2, 3)
    for one, other in zip(model2.parameters(), wanted, strict=True):
        assert torch.equal(one, other)
    assert scheduler2.last_epoch == 7


def test_the_modules_own_attributes_are_there():
    model = parts("32-true")[1]
    assert model.append is not None
    assert set(model.state_dict()) == set(net().state_dict())


def test_wrong_uses_are_named(tmp_path):
    runtime, model, optimizer, _ = parts("32-true")
    with pytest.raises(ConfigError, match="one of the two"):
        runtime.clip_gradients(model, optimizer)
    runtime.save(tmp_path / "saved", {"model": model})
    with pytest.raises(CheckpointError, match="optimizer.*model"):
        runtime.load(tmp_path / "saved", {"optimizer": optimizer})
    with pytest.raises(ConfigError, match="launch"):
        Runtime(accelerator="cpu", devices=2).setup(net())
