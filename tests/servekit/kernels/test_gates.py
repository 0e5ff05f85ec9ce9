"""The gates of SwiGLU and GeGLU: every implementation against float64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases, multiplies_float8

SILU = backends("servekit.kernels.silu_and_mul", "silu_and_mul", of=("reference", "deterministic"))
ROUNDED = backends("servekit.kernels.silu_and_mul", "silu_and_mul_quantized")
GELU = backends("servekit.kernels.silu_and_mul", "gelu_and_mul")
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def make_input(shape, dtype):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("backend", "dtype"), cases(SILU))
@pytest.mark.parametrize("shape", [(3, 2 * 37), (1, 2 * 1030), (5, 2)])
def test_silu_and_mul(backend, dtype, shape):
    x = make_input(shape, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    actual = SILU[backend](x)
    assert actual.dtype == dtype
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(actual.double(), torch.nn.functional.silu(gate) * up, **near)


@pytest.mark.parametrize(("backend", "dtype"), cases(GELU))
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_mul(backend, dtype, approximate):
    x = make_input((3, 2 * 37), dtype)
    gate, up = x.double().chunk(2, dim=-1)
    exact = torch.nn.functional.gelu(gate, approximate=approximate) * up
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(GELU[backend](x, approximate=approximate).double(), exact, **near)


@pytest.mark.parametrize(("backend", "dtype"), cases(ROUNDED))
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("width", [37, 5000], ids=["one part", "two parts"])
def test_a_gate_in_eight_bits_is_the_gate_then_rounded(backend, dtype, to, width):
    if backend == "triton" and to != torch.int8 and not multiplies_float8():
        pytest.skip("this device does not have float8")
    x = make_input((3, 2 * width), dtype)
    quantize = backends("servekit.kernels.quantize", "quantize")[backend]
    values, scales = quantize(SILU[backend](x), to, width)
    found, found_scales = ROUNDED[backend](x, to)
    torch.testing.assert_close(found_scales, scales[:, 0])
    off = (found.float() - values.float()).abs()
    if DEVICE.type == "cpu":
        assert not bool(off.any())
    else:  # the two kernels are compiled apart, and a number between two steps may go either way
        step = 1.0 if to == torch.int8 else values.float().abs() / 8 + 1e-2
        assert bool((off <= step).all())
        assert float((off > 0).double().mean()) < 0.01
