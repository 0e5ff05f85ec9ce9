"""Sampling in plain steps, and the random numbers that all implementations draw."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token a row from the renormalised distribution of the tokens that are kept.

    Kept are the tokens at least ``min_p`` times as likely as the most likely one, of these the ``top_k`` most likely,
    and of these the smallest set whose share reaches ``top_p``. Tokens as likely as the last one kept are kept as well,
    so the answer does not depend on an order among equals. The draw is Gumbel's: the largest of logit + noise, with
    noise that a counter-based generator makes of the row's seed and the token's number, so no other row changes it.

    Args:
        logits: ``[rows, vocab]`` float32; -inf where a token is forbidden.
        temperature: ``[rows]`` float32; 0 takes the most likely token, the first of equals.
        top_k: ``[rows]`` int32, 1..vocab.
        top_p: ``[rows]`` float32 in (0, 1].
        min_p: ``[rows]`` float32 in [0, 1].
        seeds: ``[rows]`` int64, another one for each token of a request.

    Returns:
        The tokens ``[rows]`` int64, and the highest logit of each row, not finite where no token can be told.

    Sources: top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024; Philox, Salmon et al., SC 2011; Gumbel-max,
    Maddison et al. 2014.
    """
    highest, greedy = logits.max(dim=-1)
    warm = torch.where(temperature > 0, temperature, 1.0)[:, None]
    scaled = logits / warm
    probabilities = scaled.softmax(dim=-1)
    kept = probabilities >= min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
    ranked = probabilities.masked_fill(~kept, 0).sort(dim=-1, descending=True).values
    kth = ranked.gather(1, (top_k.long() - 1)[:, None])
    kept &= probabilities >= kth
    ranked = probabilities.masked_fill(~kept, 0).sort(dim=-1, descending=True).values
    before = ranked.cumsum(dim=-1) - ranked
    needed = (before < top_p[:, None] * ranked.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    last = ranked.gather(1, needed.clamp(min=1) - 1)
    kept &= (probabilities >= last) | (top_p >= 1)[:, None]
    noisy = (scaled - waits(seeds, logits.shape[1]).log()).masked_fill(~kept, float("-inf"))
    return torch.where(temperature > 0, noisy.argmax(dim=-1), greedy), highest


def waits(seeds: Tensor, count: int) -> Tensor:
    """Exponential numbers ``[len(seeds), count]`` float32; the logarithm of one is Gumbel noise, negated."""
    u = uniforms(seeds, count)
    return torch.where(u < 1e-3, u + 0.5 * u * u, -torch.log1p(-u)).clamp(min=1e-20)


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """Philox-4x32-10 at counters 0..count-1, its first word as a number in [0, 1)."""
    c0 = torch.arange(count, dtype=torch.int64, device=seeds.device).expand(len(seeds), count)
    c1, c2, c3 = (torch.zeros_like(c0) for _ in range(3))
    k0, k1 = (seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None]
    for _ in range(10):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    signed = torch.where(c0 >= 1 << 31, c0 - (1 << 32), c0)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    whole = a * b  # wraps around as int64; its 64 bits are right
    return whole >> 32 & MASK, whole & MASK
