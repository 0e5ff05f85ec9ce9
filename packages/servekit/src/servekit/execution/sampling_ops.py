"""The operations of the sampler on ``[rows, vocab]`` float32; a row comes out the same whatever is beside it."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

OUT = float("-inf")
LOOKED_AT = 1024  # most likely tokens that top-p looks at before it sorts them all
MASK64 = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_of(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed & MASK64


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each row's token at a position of its output: a hash, so nothing else changes it."""
    numbers = (counter_seeds(seeds, positions) >> np.uint64(11)).astype(np.float64)
    numbers *= 2.0**-53
    return numbers


def counter_seeds(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits for each row that seed the noise of its token at a position of its output.

    Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    return _mixed(_mixed(seeds) ^ (positions.astype(np.uint64) * GOLDEN))


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Whole numbers of 64 bits wrap around."""
    z = z + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than ``min_p`` times the most likely one."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), OUT)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the ``top_k`` most likely tokens, and of these the smallest set whose share reaches ``top_p``.

    Args:
        top_k: ``[rows]`` int64, 1..vocab.
        top_p: ``[rows, 1]`` in (0, 1].

    Cost: a partial sort where ``LOOKED_AT`` tokens suffice for every row, else a full one.
    """
    vocab = logits.shape[-1]
    if vocab > LOOKED_AT:
        values, ids = logits.topk(LOOKED_AT)
        kept = _kept(values, logits, top_k, top_p)
        narrow = (top_k < LOOKED_AT) | ~kept[:, -1]
        if bool((narrow | _keeps_all(top_k, top_p, vocab)).all()):
            out = torch.full_like(logits, OUT).scatter(1, ids, values.masked_fill(~kept, OUT))
            return torch.where(_keeps_all(top_k, top_p, vocab)[:, None], logits, out)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    kept = _kept(values, logits, top_k, top_p)
    return torch.full_like(logits, OUT).scatter(1, ids, values.masked_fill(~kept, OUT))


def _keeps_all(top_k: Tensor, top_p: Tensor, vocab: int) -> Tensor:
    return (top_k >= vocab) & (top_p[:, 0] >= 1)


def _kept(values: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which of the sorted ``values`` stay: those within k whose predecessors have not reached p yet."""
    within = torch.arange(values.shape[-1], device=values.device) < top_k[:, None]
    limited = values.masked_fill(~within, OUT).logsumexp(dim=-1, keepdim=True)
    total = torch.where(top_k[:, None] <= values.shape[-1], limited, logits.logsumexp(dim=-1, keepdim=True))
    before = (values - total).exp().cumsum(dim=-1)
    before = torch.cat((torch.zeros_like(before[:, :1]), before[:, :-1]), dim=-1)
    kept = within & ((before < top_p) | (top_p >= 1))
    kept[:, 0] = True  # also where p is less than float32 can say
    return kept


def keep_typical(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest the distribution's own, up to a share (Meister et al. 2022)."""
    logprobs = logits.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs.clamp(min=-1e4)).sum(dim=-1, keepdim=True)
    order = (logprobs.clamp(min=-1e4) + entropy).abs().argsort(dim=-1, stable=True)
    sorted_share = probabilities.gather(1, order).cumsum(dim=-1)
    before = torch.cat((torch.zeros_like(sorted_share[:, :1]), sorted_share[:, :-1]), dim=-1)
    drop = (before >= typical_p) & (typical_p < 1)
    drop[:, 0] = False  # also where p is less than float32 can say
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), OUT)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the running sum of each row's probabilities passes its uniform number: ``[rows]`` int64."""
    sums = logits.softmax(dim=-1).double().cumsum(dim=-1)
    wanted = uniforms.double()[:, None] * sums[:, -1:]
    tokens = torch.searchsorted(sums, wanted, right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())  # where rounding would step past the last possible token
    return torch.minimum(tokens, last)[:, 0]
