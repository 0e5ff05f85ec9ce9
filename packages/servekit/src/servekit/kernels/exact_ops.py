"""Sums and exponentials of single additions and multiplications: the same bits wherever a number lies.

IEEE 754 rounds each of these once, so vector units, their scalar tails and other machines agree. Exponentials and
reductions of libraries need not: where in a tensor a number stands may matter, and how many threads there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = -87.0, 88.0  # beyond them exp is 0, or stays what it is there: no denormals, no infinity
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first has few bits: its products are exact
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
EXPONENT_BIAS, MANTISSA_BITS = 127, 23


def exp(x: Tensor) -> Tensor:
    """``e ** x`` of float32 to about two units in the last place; 0 below -87, and ``exp(88)`` above 88.

    Source: Moshier's Cephes, ``expf``: a power of two times a polynomial of the rest.
    """
    inside = x.clamp(LOWEST, HIGHEST)
    power = (inside * LOG2_E).round_()
    rest = inside - power * LN2_HIGH
    rest -= power * LN2_LOW
    series = rest * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        series += coefficient
        series *= rest
    series *= rest
    series += rest
    series += 1.0
    scale = ((power.to(torch.int32) + EXPONENT_BIAS) << MANTISSA_BITS).view(torch.float32)
    return series.mul_(scale).masked_fill_(x < LOWEST, 0.0)


def tanh(x: Tensor) -> Tensor:
    """Of float32, by ``exp``."""
    return 1.0 - 2.0 / (exp(2.0 * x) + 1.0)


def sum_last(x: Tensor) -> Tensor:
    """The sum over the last dimension, which stays with size 1: halves are added until one number is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        total = x[..., :half] + x[..., half : 2 * half]
        if x.shape[-1] % 2:
            total[..., :1] += x[..., -1:]
        x = total
    return x
