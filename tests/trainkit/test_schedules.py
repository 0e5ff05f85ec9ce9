"""Schedules: their values, and that they resume exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torch_schedules

from common_platform.errors import ConfigError
from trainkit.plot_schedule import plot_schedule, schedule_rates
from trainkit.schedules import (
    DECAYS,
    WARMUPS,
    WarmupThen,
    cosine_restarts_schedule,
    inverse_sqrt_schedule,
    warmup_schedule,
    wsd_schedule,
)


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


def one_cycle(optimizer):
    return torch_schedules.OneCycleLR(optimizer, max_lr=2.0, total_steps=50)


SCHEDULES = {
    "inverse_sqrt": lambda o: inverse_sqrt_schedule(o, warmup_steps=4),
    "wsd": lambda o: wsd_schedule(o, warmup_steps=3, stable_steps=5, decay_steps=6, decay="cosine"),
    "restarts": lambda o: cosine_restarts_schedule(o, warmup_steps=2, cycle_steps=4, growth=2.0, min_factor=0.1),
    "warmup": lambda o: WarmupThen(o, warmup_steps=5, warmup="cosine"),
    "multi_step": lambda o: WarmupThen(o, warmup_steps=3, after=torch_schedules.MultiStepLR(o, [4, 9])),
    "cosine": lambda o: WarmupThen(o, warmup_steps=3, after=torch_schedules.CosineAnnealingLR(o, 12)),
    "custom": lambda o: WarmupThen(o, warmup_steps=2, after=torch_schedules.LambdaLR(o, lambda n: 1 / (1 + n))),
    "one_cycle": one_cycle,
}


def test_inverse_sqrt_is_the_half_after_four_warmups():
    found = schedule_rates(SCHEDULES["inverse_sqrt"], 20, lr=2.0)
    assert found[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert found[16] == pytest.approx(1.0)


def test_wsd_is_stable_and_then_falls():
    found = schedule_rates(SCHEDULES["wsd"], 16, lr=2.0)
    assert found[2:9] == pytest.approx([2.0] * 7)
    assert found[8:15] == sorted(found[8:15], reverse=True)
    assert found[14:] == pytest.approx([0.0, 0.0])


def test_restarts_grow():
    found = schedule_rates(SCHEDULES["restarts"], 20, lr=1.0)
    assert [i for i, rate in enumerate(found) if rate == 1.0] == [1, 2, 6, 14]
    assert min(found[2:]) > 0.1


@pytest.mark.parametrize("warmup", WARMUPS)
@given(steps=st.integers(0, 12))
def test_after_its_warmup_the_other_schedule_runs_as_if_alone(warmup, steps):
    def make(optimizer):
        after = torch_schedules.CosineAnnealingLR(optimizer, 12)
        return WarmupThen(optimizer, warmup_steps=steps, warmup=warmup, after=after)

    alone = schedule_rates(lambda o: torch_schedules.CosineAnnealingLR(o, 12), 10, lr=2.0)
    found = schedule_rates(make, steps + 10, lr=2.0)
    assert found[steps:] == alone
    assert found[:steps] == sorted(found[:steps])


@pytest.mark.parametrize("name", SCHEDULES)
@given(stop=st.integers(0, 15))
def test_every_schedule_resumes_exactly(name, stop):
    whole = schedule_rates(SCHEDULES[name], 16, lr=2.0)

    def run(opt, schedule, count):
        found = []
        for _ in range(count):
            found.append(float(opt.param_groups[0]["lr"]))
            opt.step()
            schedule.step()
        return found

    first = optimizer()
    schedule = SCHEDULES[name](first)
    run(first, schedule, stop)
    second = optimizer()
    resumed = SCHEDULES[name](second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert run(second, resumed, 16 - stop) == whole[stop:]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_schedule_can_be_drawn(tmp_path, ending):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"schedule.{ending}"
    rates = plot_schedule(SCHEDULES["wsd"], 16, picture)
    assert len(rates) == 16
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda o: inverse_sqrt_schedule(o, warmup_steps=0), "warmup_steps"),
        (lambda o: wsd_schedule(o, warmup_steps=1, stable_steps=1, decay_steps=0), "decay_steps"),
        (lambda o: cosine_restarts_schedule(o, warmup_steps=0, cycle_steps=0), "cycle_steps"),
        (lambda o: WarmupThen(o, warmup_steps=-1), "warmup_steps"),
        (lambda o: WarmupThen(o, warmup_steps=1, after=torch_schedules.ReduceLROnPlateau(o)), "ReduceLROnPlateau"),
    ],
)
def test_wrong_schedules_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make(optimizer())
