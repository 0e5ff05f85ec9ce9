"""Penalties, masks and biases: every implementation against the definition, element by element."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends

PENALISE = backends("servekit.kernels.logits", "penalise")
MASK = backends("servekit.kernels.logits", "mask")
BIAS = backends("servekit.kernels.logits", "add_bias")
VOCAB = 75


def make_logits(rows):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("backend", PENALISE)
def test_penalties_count_the_output_and_see_the_prompt(backend):
    logits = make_logits(4)
    before = logits.clone()
    rows, slots = torch.tensor([3, 1], device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    counts = torch.zeros(5, VOCAB, dtype=torch.int32, device=DEVICE)
    in_prompt = torch.zeros(5, VOCAB, dtype=torch.bool, device=DEVICE)
    counts[0, 7], counts[4, 70] = 3, 1
    in_prompt[0, 9] = True
    presence, frequency, repetition = (torch.tensor(v, device=DEVICE) for v in ([0.5, 0.25], [0.125, 1.0], [2.0, 1.0]))
    PENALISE[backend](logits, rows, slots, counts, in_prompt, presence, frequency, repetition)
    expected = before.clone()
    for token in (7, 9):
        value = before[3, token].item()
        expected[3, token] = value / 2 if value > 0 else value * 2
    expected[3, 7] -= 0.125 * 3 + 0.5
    expected[1, 70] -= 1.25
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("backend", MASK)
def test_a_mask_keeps_the_tokens_whose_bits_are_set(backend):
    logits = make_logits(3)
    before = logits.clone()
    bits = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    bits[0, 0], bits[0, 2] = -(1 << 31), 0b101  # tokens 31, 64 and 66
    MASK[backend](logits, torch.tensor([1], device=DEVICE), bits)
    left = torch.isfinite(logits[1]).nonzero()[:, 0].tolist()
    assert left == [31, 64, 66]
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert torch.equal(logits[1, left], before[1, left])


@pytest.mark.parametrize("backend", BIAS)
def test_biases_are_added_where_they_belong(backend):
    logits = make_logits(3)
    expected = logits.clone()
    rows, tokens = torch.tensor([0, 2, 2], device=DEVICE), torch.tensor([5, 0, 74], device=DEVICE)
    biases = torch.tensor([1.5, -100.0, 2.0], device=DEVICE)
    expected[0, 5] += 1.5
    expected[2, 0] -= 100.0
    expected[2, 74] += 2.0
    BIAS[backend](logits, rows, tokens, biases)
    torch.testing.assert_close(logits, expected)
