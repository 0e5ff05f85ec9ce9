"""Eight-bit activations: every implementation keeps each number to within half a step of its group."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases, multiplies_float8

from common_platform.kernels import is_interpreted
from servekit.kernels.quantize import LARGEST

QUANTIZE = backends("servekit.kernels.quantize", "quantize")
SHAPES = [(1, 64, 64), (5, 200, 128), (33, 129, 129), (3, 96, 32), (0, 64, 64)]
TO = [torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz]


@pytest.mark.parametrize(("backend", "dtype"), cases(QUANTIZE))
@pytest.mark.parametrize(("tokens", "width", "group"), SHAPES)
@pytest.mark.parametrize("to", TO)
def test_values_times_scales_are_the_numbers_to_half_a_step(backend, dtype, tokens, width, group, to):
    if backend == "triton" and to == torch.float8_e4m3fnuz:
        pytest.skip("only MI300 has this type")
    if backend == "triton" and to != torch.int8 and not multiplies_float8():
        pytest.skip("this device does not have float8")
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    values, scales = QUANTIZE[backend](x, to, group)
    assert values.dtype == to
    assert values.shape == x.shape
    assert scales.shape == (tokens, -(-width // group))
    spread = scales.double().repeat_interleave(group, dim=1)[:, :width]
    off = (values.double() * spread - x.double()).abs()
    step = spread if to == torch.int8 else torch.maximum(x.double().abs() / 8, spread * 2**-9)
    wrong = off > step * 0.501
    if backend == "triton" and is_interpreted() and to != torch.int8:  # its rounding to float8 forgets to carry
        assert float(wrong.double().mean()) < 0.1 if wrong.numel() else True
    else:
        assert not bool(wrong.any())


@pytest.mark.parametrize(("backend", "dtype"), cases(QUANTIZE))
@pytest.mark.parametrize("to", TO[:2])
def test_what_already_has_eight_bits_comes_back_and_zeros_stay(backend, dtype, to):
    if backend == "triton" and to != torch.int8 and not multiplies_float8():
        pytest.skip("this device does not have float8")
    steps = torch.arange(-7, 9).repeat(2, 4).float()
    exact = torch.cat((steps * 8, torch.zeros(1, 64))).to(dtype).to(DEVICE)
    exact[:2, 0] = LARGEST[to]
    values, scales = QUANTIZE[backend](exact, to, 64)
    torch.testing.assert_close(scales[:2], torch.ones_like(scales[:2]), rtol=1e-6, atol=0)
    assert torch.equal(values[:2].float(), exact[:2].float())
    assert not bool(values[2].float().any())
    assert bool(torch.isfinite(scales).all())
