"""The engine's sampler on Triton's kernels: its tokens are the reference's, and no torch operation draws them."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from tests.kernels.backends import DEVICE
from tests.servekit.kernels.test_engine_on_triton import PROMPTS, run, write_model

from common_platform.kernels import runs_triton
from servekit import SamplingParams
from servekit.execution import choices
from servekit.execution.sampler import Sampler
from servekit.kernels.logits import reference as edits
from servekit.kernels.sample import reference as sampling
from servekit.layers.kernels import LogitKernels, kernels_of

pytestmark = pytest.mark.skipif(runs_triton(DEVICE) is not None, reason="triton does not run here")
VOCAB = 77
ASKED = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 5},
    "penalties": {"seed": 1, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "penalties, greedy": {"temperature": 0.0, "repetition_penalty": 1.5},
    "bias": {"temperature": 0.0, "logit_bias": {3: 4.0, 70: -100.0}},
    "masked": {"seed": 2, "allowed_token_ids": [1, 31, 32, 76], "min_tokens": 2},
    "bad words": {"seed": 3, "bad_words_token_ids": [[4], [5, 6]]},
    "typical": {"seed": 4, "typical_p": 0.7, "top_p": 0.9},
}
REFERENCE = LogitKernels(penalise=edits.penalise, mask=edits.mask, add_bias=edits.add_bias)


def make_sampler(names, *, is_triton):
    found = kernels_of("cuda")
    kernel, edit = (found.sample, found.logits) if is_triton else (sampling.sample, REFERENCE)
    sampler = Sampler(VOCAB, 16, DEVICE, kernel, edit=edit)
    for slot, name in enumerate(names):
        sampler.add_row(slot, SamplingParams(**ASKED[name]), [1, 2, 2], [9], [1])
    return sampler


def logits_at(step, rows):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(step)).to(DEVICE) * 2


def test_every_parameter_gives_the_tokens_of_the_reference_in_triton():
    slots = list(range(len(ASKED)))
    triton, plain = (make_sampler(ASKED, is_triton=one) for one in (True, False))
    for step in range(5):
        logits = logits_at(step, len(ASKED))
        before = logits.clone()
        assert triton.sample(logits, slots).token_ids == plain.sample(logits, slots).token_ids
        assert torch.equal(logits, before)


def test_tokens_that_triton_draws_unseen_are_those_that_the_host_looks_at():
    """Penalties are counted on the device, so nobody waits for the tokens that they count."""
    names = ["greedy", "drawn", "penalties", "penalties, greedy", "bias"]
    slots = list(range(len(names)))
    unseen, seen = (make_sampler(names, is_triton=True) for _ in range(2))
    assert unseen.is_plain(slots)
    for step in range(5):
        logits = logits_at(step, len(names))
        expected = seen.sample(logits, slots).token_ids
        assert unseen.draw_unseen(logits, slots)[0].tolist() == expected
    assert not make_sampler(ASKED, is_triton=True).is_plain(list(range(len(ASKED))))


def test_the_engine_samples_by_the_kernels_of_triton(tmp_path, monkeypatch):
    """By calls counted, and by the tokens of the same engine with the reference in their place."""
    calls = set()
    for operation, names in (("logits", ("penalise", "mask", "add_bias")), ("sample", ("sample",))):
        module = importlib.import_module(f"servekit.kernels.{operation}.triton_backend")
        for name in names:
            whole = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, w=whole, n=name: (calls.add(n), w(*a))[1])
    path = write_model(tmp_path / "model", "llama")
    params = [SamplingParams(**ASKED[name], max_tokens=3, ignore_eos=True) for name in ("penalties", "bias", "masked")]
    found = run(path, PROMPTS, params)
    assert calls == {"penalise", "mask", "add_bias", "sample"}
    plain = dataclasses.replace(kernels_of("cuda"), sample=sampling.sample, logits=REFERENCE)
    monkeypatch.setattr(choices, "kernels_of", lambda platform: plain)
    calls.clear()
    assert run(path, PROMPTS, params) == found
    assert not calls
