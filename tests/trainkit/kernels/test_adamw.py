"""AdamW in one launch: the parameters, moments and checkpoints of torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.kernels.backends import DEVICE, backends

from common_platform.errors import ConfigError
from common_platform.kernels import is_interpreted
from trainkit.kernels import FusedAdamW
from trainkit.kernels.adamw.group import Rates, Tensors

STEP = backends("trainkit.kernels.adamw", "adamw_step")
HERE = "triton" if is_interpreted() or DEVICE.type == "cuda" else "torch"
SHAPES = [(1,), (3, 5), (0,), (1030,), (17, 2000)]  # the last has several programs


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(DEVICE)) for shape in SHAPES]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype).to(DEVICE)


@pytest.mark.parametrize("backend", list(STEP))
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(backend, decay):
    ours, theirs = make(), make()
    torch_one = torch.optim.AdamW(theirs, lr=3e-2, betas=(0.8, 0.95), weight_decay=decay, foreach=False)
    means, squares = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    rates = Rates(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=decay)
    for step in range(1, 4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        torch_one.step()
        with torch.no_grad():
            data = [p.detach() for p in ours]
            STEP[backend](Tensors(data, [p.grad for p in ours], means, squares, [step] * len(ours)), rates)
    for number, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        state = torch_one.state[wanted]
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(means[number], state["exp_avg"], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(squares[number], state["exp_avg_sq"], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", list(STEP))
def test_half_precision_parameters_with_float32_moments(backend):
    dtype = torch.float16 if is_interpreted() else torch.bfloat16
    ours, wide = make(dtype), make()
    for mine, other in zip(ours, wide, strict=True):
        other.data.copy_(mine.data)
    means, squares = (
        [torch.zeros(p.shape, device=DEVICE) for p in ours],
        [torch.zeros(p.shape, device=DEVICE) for p in ours],
    )
    give_gradients(ours, 1)
    for mine, other in zip(ours, wide, strict=True):
        other.grad = mine.grad.float()
    with torch.no_grad():
        STEP[backend](
            Tensors([p.detach() for p in ours], [p.grad for p in ours], means, squares, [1] * len(ours)),
            Rates(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01),
        )
    torch.optim.AdamW(wide, lr=1e-2, weight_decay=0.01).step()
    for mine, other in zip(ours, wide, strict=True):
        torch.testing.assert_close(mine.float(), other.data, rtol=1e-2, atol=1e-2)


def steps(kind, parameters, numbers, state=None):
    groups = [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:], "weight_decay": 0.2}]
    optimizer = kind(groups, lr=1e-2)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for number in numbers:
        give_gradients(parameters, number)
        if number == 2:
            parameters[1].grad = None  # frozen for a step: its count stays behind
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("implementation", [HERE])
@pytest.mark.parametrize(("first", "second"), [(torch.optim.AdamW, FusedAdamW), (FusedAdamW, torch.optim.AdamW)])
def test_a_checkpoint_of_either_is_a_checkpoint_of_the_other(implementation, first, second):
    wanted, mixed = make(), make()
    steps(torch.optim.AdamW, wanted, [1, 2, 3, 4])
    state = steps(first, mixed, [1, 2])
    steps(second, mixed, [3, 4], state)
    for mine, other in zip(mixed, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("implementation", [HERE])
def test_gradients_that_do_not_lie_in_one_piece(implementation):
    ours, theirs = ([torch.nn.Parameter(torch.ones(6, 4, device=DEVICE))] for _ in range(2))
    for optimizer, parameters in ((FusedAdamW(ours), ours), (torch.optim.AdamW(theirs), theirs)):
        parameters[0].grad = torch.arange(24.0, device=DEVICE).view(4, 6).t()
        optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=2e-6)


def test_the_closure_is_called_once_and_its_loss_returned():
    parameters = make()
    optimizer = FusedAdamW(parameters)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [1]


def test_what_it_does_not_do_is_refused():
    with pytest.raises(ConfigError, match="amsgrad"):
        FusedAdamW([{"params": make(), "amsgrad": True}])
