"""Sampling: which tokens are kept, how often each is drawn, and that no row changes another's draw."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends

from common_platform.kernels import is_interpreted
from servekit.kernels.sample import reference

SAMPLE = backends("servekit.kernels.sample", "sample")
VOCAB = 300


def make_rows(rows, *, seed=0, vocab=VOCAB, **given):
    settings = {"temperature": 1.0, "top_k": vocab, "top_p": 1.0, "min_p": 0.0} | given
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    kinds = {"top_k": torch.int32}
    columns = [torch.full((rows,), settings[name], dtype=kinds.get(name, torch.float32)) for name in settings]
    seeds = torch.arange(rows, dtype=torch.int64) * 0x1234567890ABC + 99
    return [tensor.to(DEVICE) for tensor in (logits, *columns, seeds)]


LIMITS = {
    "all": {},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 7},
    "top-1": {"top_k": 1},
    "top-p": {"top_p": 0.6},
    "tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.1},
    "all limits": {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
}


@pytest.mark.parametrize("backend", SAMPLE)
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_draws_the_same_tokens_as_the_reference(backend, limits):
    given = make_rows(9, **limits)
    tokens, highest = SAMPLE[backend](*given)
    expected, top = reference.sample(*given)
    assert torch.equal(highest, top)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", SAMPLE)
def test_a_row_draws_the_same_token_alone_and_among_others(backend):
    given = make_rows(5, top_k=30, top_p=0.9)
    together = SAMPLE[backend](*given)[0]
    alone = torch.cat([SAMPLE[backend](*[tensor[row : row + 1] for tensor in given])[0] for row in range(5)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("backend", SAMPLE)
def test_tokens_come_as_often_as_they_are_likely(backend):
    if backend == "triton" and is_interpreted():
        pytest.skip("interpreted, it draws what the reference draws, which is tried here; 1500 rows would take minutes")
    rows, vocab = 1500, 8
    given = make_rows(rows, vocab=vocab, top_p=0.9)
    given[0] = given[0][:1].expand(rows, vocab).contiguous() / 3
    tokens, _ = SAMPLE[backend](*given)
    shares = torch.bincount(tokens.cpu(), minlength=vocab) / rows
    likely = given[0][0].softmax(dim=-1).cpu()
    ranked = likely.sort(descending=True)
    kept = ranked.indices[: int(((ranked.values.cumsum(0) - ranked.values) < 0.9).sum())]
    exact = torch.zeros(vocab).scatter(0, kept, likely[kept] / likely[kept].sum())
    assert not shares[exact == 0].any()
    torch.testing.assert_close(shares, exact, atol=0.05, rtol=0)  # four standard deviations of 1500 draws


@pytest.mark.parametrize("backend", SAMPLE)
def test_forbidden_tokens_and_rows_without_a_token(backend):
    given = make_rows(4, top_p=0.99)
    given[0][0, 5:] = float("-inf")
    given[0][1] = float("-inf")
    given[0][2, 7] = float("nan")
    given[0][3, :] = 0.0  # all alike
    tokens, highest = SAMPLE[backend](*given)
    assert tokens[0] < 5
    assert torch.isfinite(highest).tolist() == [True, False, False, True]
    assert bool(((tokens >= 0) & (tokens < VOCAB)).all())


@pytest.mark.parametrize("backend", SAMPLE)
def test_equals_of_the_last_kept_token_are_kept(backend):
    given = make_rows(24, vocab=4, top_k=2)
    given[0] = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).expand(24, 4).contiguous().to(DEVICE)
    tokens, _ = SAMPLE[backend](*given)
    assert set(tokens.tolist()) == {0, 1, 2}


def test_random_numbers_are_philox():
    """Known answers: the first words of Philox-4x32-10 (Random123's kat_vectors) at counter and key 0."""
    first = reference.uniforms(torch.tensor([0]), 1)[0, 0].item()
    word = 0x6627E8D5
    assert first == pytest.approx(word * 4.6566127342e-10, rel=1e-6)
