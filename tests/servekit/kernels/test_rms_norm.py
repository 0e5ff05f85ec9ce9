"""RMSNorm: every implementation against float64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

from common_platform.kernels import is_interpreted
from servekit.kernels.rms_norm import reference

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}
NORM = backends("servekit.kernels.rms_norm", "rms_norm", of=("reference", "fused", "deterministic"))
ADD = backends("servekit.kernels.rms_norm", "add_rms_norm", of=("reference", "fused", "deterministic"))
QUANTIZED = backends("servekit.kernels.rms_norm", "rms_norm_quantized")


def make_inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator).to(dtype).to(DEVICE)
    return x, residual, torch.randn(shape[1], generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("backend", "dtype"), cases(NORM))
@pytest.mark.parametrize("shape", [(1, 64), (7, 1000), (33, 576), (3, 1)])
def test_rms_norm_agrees_with_float64(backend, dtype, shape):
    x, _, weight = make_inputs(shape, dtype)
    exact = torch.nn.functional.rms_norm(x.double(), shape[1:], weight.double(), 1e-6)
    actual = NORM[backend](x, weight, 1e-6)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), cases(NORM))
def test_rms_norm_of_heads_that_lie_in_a_wider_row(backend, dtype):
    whole, _, _ = make_inputs((5, 6 * 16), dtype)
    x = whole.view(5, 6, 16)[:, 1:4]
    weight = torch.ones(16, dtype=dtype, device=DEVICE)
    actual = NORM[backend](x, weight, 1e-6)
    torch.testing.assert_close(actual, NORM["reference"](x.contiguous(), weight, 1e-6), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("backend", "dtype"), cases(ADD))
def test_add_rms_norm_returns_the_sum_as_the_next_residual(backend, dtype):
    x, residual, weight = make_inputs((5, 33), dtype)
    total = x + residual
    normed, new_residual = ADD[backend](x.clone(), residual.clone(), weight, 1e-5)
    assert torch.equal(new_residual, total)
    exact = torch.nn.functional.rms_norm(total.double(), (33,), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), cases(QUANTIZED))
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("with_residual", [False, True])
def test_eight_bits_with_a_scale_a_row_keep_the_norm(backend, dtype, to, with_residual):
    x, residual, weight = make_inputs((7, 200), dtype)
    total = x + residual if with_residual else x
    exact = reference.rms_norm(total, weight, 1e-5).double()
    given = residual.clone() if with_residual else None
    found, scales, new_residual = QUANTIZED[backend](x.clone(), given, weight, 1e-5, to)
    assert found.dtype == to
    assert torch.equal(new_residual, total)
    largest = exact.abs().amax(dim=-1, keepdim=True)
    off = (found.double() * scales.double()[:, None] - exact).abs()
    step = largest / 127 if to == torch.int8 else exact.abs() / 8 + largest / 2**9 / 448
    within = (off <= step * 0.55 + largest * 1e-3).double().mean()
    loses_carries = backend == "triton" and is_interpreted() and to != torch.int8  # triton's interpreter, not a device
    assert within >= (0.9 if loses_carries else 1.0)
