"""The chunked loss: the numbers of the plain one, in the memory of a chunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit.lm.loss import chunked_cross_entropy, chunked_logprobs

TOKENS, WIDTH, VOCAB, CHUNK = 300, 16, 2000, 64


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that is made under it, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else [made]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return made


def parts(dtype=torch.float32, *, bias: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype).mul_(3).requires_grad_()
    return hidden, head, torch.randint(VOCAB, (TOKENS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, CHUNK, TOKENS, 10_000])
def test_loss_and_gradients_are_the_plain_ones(bias, chunk):
    hidden, head, targets = parts(torch.float64, bias=bias)
    wanted = nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
    found = chunked_cross_entropy(hidden, targets, head, chunk=chunk)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-4)
    one, other = (torch.autograd.grad(loss * 0.25, [hidden, *head.parameters()]) for loss in (found, wanted))
    for ours, plain in zip(one, other, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_no_tensor_of_either_pass_is_larger_than_a_chunk_of_logits(bias):
    hidden, head, targets = parts(bias=bias)
    with LargestTensor() as ours:
        chunked_cross_entropy(hidden, targets, head, chunk=CHUNK).backward()
    with LargestTensor() as plain:
        nn.functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    assert ours.numel == CHUNK * VOCAB
    assert plain.numel == TOKENS * VOCAB


def test_a_certain_error_has_a_finite_loss():
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[200.0], [-200.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.tensor([1]), head)
    assert loss.item() == 400
    loss.backward()
    assert torch.isfinite(hidden.grad).all()


def test_without_gradients_nothing_is_kept():
    hidden, head, targets = parts()
    with torch.no_grad():
        quiet = chunked_cross_entropy(hidden, targets, head, chunk=CHUNK)
    torch.testing.assert_close(quiet, chunked_cross_entropy(hidden, targets, head, chunk=CHUNK).detach())
    assert not quiet.requires_grad


def test_no_labels_make_no_loss():
    hidden, head, targets = parts()
    loss = chunked_cross_entropy(hidden[:0], targets[:0], head)
    assert loss.item() == 0
    assert chunked_logprobs(hidden[:0], targets[:0], head).shape == (0,)


def test_a_second_backward_is_refused():
    hidden, head, targets = parts()
    loss = chunked_cross_entropy(hidden, targets, head)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_low_precision_loses_no_more_than_its_weights_do():
    hidden, head, targets = parts(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, targets, head, chunk=CHUNK)
    wanted = nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0.5)
    (ours,), (plain,) = torch.autograd.grad(loss, [hidden]), torch.autograd.grad(wanted, [hidden])
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.02)


def test_logprobs_add_up_to_the_loss_and_have_its_gradient():
    hidden, head, targets = parts()
    logprobs = chunked_logprobs(hidden, targets, head, chunk=CHUNK)
    plain = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, plain)
    (ours,), (wanted,) = (torch.autograd.grad(part.square().sum(), [hidden]) for part in (logprobs, plain))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
