"""The loss of a linear head, some columns at a time: against torch's on whole logits, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

from common_platform.kernels import is_interpreted
from trainkit.kernels import linear_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
FOLD = backends("trainkit.kernels.linear_cross_entropy", "fold")
GRADIENT = backends("trainkit.kernels.linear_cross_entropy", "to_gradient")
HERE = "triton" if is_interpreted() or DEVICE.type == "cuda" else "torch"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if not is_interpreted() else [])


def make(tokens, width, vocab, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(vocab, width, generator=generator).mul(width**-0.5).to(dtype).to(DEVICE)
    targets = torch.randint(0, vocab, (tokens,), generator=generator).to(DEVICE)
    targets[tokens // 2 : tokens // 2 + 1] = -100
    return hidden, weight, targets


@pytest.mark.parametrize(("backend", "dtype"), cases(FOLD))
@pytest.mark.parametrize("sizes", [(130,), (1, 64, 65), (50, 3000)])
def test_columns_in_parts_have_the_softmax_of_the_whole(backend, dtype, sizes):
    logits = torch.randn(3, sum(sizes), generator=torch.Generator().manual_seed(0)).mul(4).to(dtype).to(DEVICE)
    targets = torch.tensor([0, sum(sizes) - 1, -100], device=DEVICE)
    highest, total, chosen = torch.full((3,), float("-inf")), torch.zeros(3), torch.zeros(3)
    highest, total, chosen = (part.to(DEVICE) for part in (highest, total, chosen))
    first = 0
    for part in logits.split(list(sizes), dim=1):
        FOLD[backend](part, targets, first, highest, total, chosen)
        first += part.shape[1]
    log_sums = highest + total.log()
    torch.testing.assert_close(log_sums.double(), logits.double().logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    assert torch.equal(chosen[:2], logits[[0, 1], targets[:2]].float())
    scales = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)
    exact = logits.double().softmax(dim=1)
    exact[[0, 1], targets[:2]] -= 1
    first, found = 0, []
    for part in logits.split(list(sizes), dim=1):
        found.append(part.contiguous().clone())
        GRADIENT[backend](found[-1], targets, first, log_sums, scales)
        first += part.shape[1]
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(torch.cat(found, 1).double(), exact * scales[:, None], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [HERE])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, implementation, chunk):
    hidden, weight, targets = make(9, 16, 130, dtype)
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="sum")
    (exact * 0.5).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    assert loss.dtype == torch.float32
    (loss * 0.5).backward()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    for found, want in ((hidden.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets = make(5, 4, 11, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk=4), (hidden, weight))


@pytest.mark.parametrize("implementation", [HERE])
def test_agrees_with_the_loss_that_chunks_tokens(implementation):
    from trainkit.lm.loss import chunked_cross_entropy

    hidden, weight, targets = make(20, 16, 50, torch.float32)
    targets = targets.clamp_min(0)
    want = chunked_cross_entropy(hidden, targets, lambda states: states @ weight.t(), chunk=8)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, chunk=16), want)


@pytest.mark.parametrize("implementation", [HERE])
def test_the_loss_of_language_models_takes_it_where_triton_runs(implementation, monkeypatch):
    from trainkit.lm import loss

    hidden, weight, targets = make(20, 16, 50, torch.float32)
    targets = targets.clamp_min(0)
    head = torch.nn.Linear(16, 50, bias=False, device=DEVICE)
    head.weight.data.copy_(weight)
    calls = []
    monkeypatch.setattr(loss, "linear_cross_entropy", lambda *given: calls.append(1) or linear_cross_entropy(*given))
    found = loss.chunked_cross_entropy(hidden, targets, head)
    assert len(calls) == (implementation == "triton")
    found.backward()
    want = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [HERE])
def test_all_ignored_is_zero_with_zero_gradients(implementation):
    hidden, weight, targets = make(4, 8, 30, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk=16)
    loss.backward()
    assert loss == 0
    assert not bool(hidden.grad.any())
    assert not bool(weight.grad.any())


def test_only_the_gradients_that_are_wanted_are_made():
    hidden, weight, targets = make(4, 8, 30, torch.float32)
    linear_cross_entropy(hidden.requires_grad_(), weight, targets).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_under_autocast_the_head_has_its_dtype():
    hidden, weight, targets = make(6, 16, 40, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
        want = torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, weight).float(), targets, reduction="sum"
        )
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-3)
    (found,) = torch.autograd.grad(loss, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, *torch.autograd.grad(want, hidden), rtol=2e-2, atol=2e-2)
