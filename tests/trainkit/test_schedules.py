"""Schedules: their values, and that they resume exactly."""

from __future__ import annotations

import pytest
import torch

from common_platform.errors import ConfigError
from trainkit.schedules import DECAYS, WARMUPS, warmup_schedule


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def rates(count: int, **settings) -> list[float]:
    opt = optimizer()
    schedule = warmup_schedule(opt, **settings)
    found = []
    for _ in range(count):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    return found


def test_linear_warmup_and_decay():
    found = rates(8, warmup_steps=2, total_steps=6)
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_shape_rises_to_the_full_rate_and_falls_to_the_floor(warmup, decay):
    found = rates(31, warmup_steps=10, total_steps=30, warmup=warmup, decay=decay, min_factor=0.1)
    assert found[:10] == sorted(found[:10])
    assert found[9] == found[10] == pytest.approx(2.0)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[30] == pytest.approx(2.0 if decay == "constant" else 0.2)


def test_a_resumed_schedule_goes_on_exactly():
    settings = {"warmup_steps": 3, "total_steps": 10, "decay": "cosine"}
    whole = rates(10, **settings)
    first = optimizer()
    schedule = warmup_schedule(first, **settings)
    for _ in range(4):
        first.step()
        schedule.step()
    second = optimizer()
    resumed = warmup_schedule(second, **settings)
    resumed.load_state_dict(schedule.state_dict())
    second.load_state_dict(first.state_dict())
    found = []
    for _ in range(6):
        found.append(second.param_groups[0]["lr"])
        second.step()
        resumed.step()
    assert found == whole[4:]


@pytest.mark.parametrize(
    "wrong", [{"warmup": "hop"}, {"decay": "fall"}, {"warmup_steps": 11}, {"warmup_steps": -1}, {"total_steps": 0}]
)
def test_wrong_settings_are_named(wrong):
    settings = {"warmup_steps": 2, "total_steps": 10} | wrong
    if wrong == {"total_steps": 0}:
        settings["warmup_steps"] = 0
    with pytest.raises(ConfigError, match="warmup|decay"):
        warmup_schedule(optimizer(), **settings)
