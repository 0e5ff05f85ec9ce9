"""RMSNorm, RoPE and SwiGLU of a training step: both passes of every implementation against float64's autograd."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

from common_platform.kernels import is_interpreted
from trainkit.kernels import rms_norm, rope, swiglu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
NORM = backends("trainkit.kernels.rms_norm", "rms_norm_forward")
NORM_BACK = backends("trainkit.kernels.rms_norm", "rms_norm_backward")
ROTATE = backends("trainkit.kernels.rope", "rotate")
GATE = backends("trainkit.kernels.swiglu", "swiglu_forward")
GATE_BACK = backends("trainkit.kernels.swiglu", "swiglu_backward")


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def check(actual, exact, dtype, loose=1.0):
    tolerance = TOLERANCE[dtype] * loose
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def exact_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize(("backend", "dtype"), cases(NORM))
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (7, 1000), (300, 24), (0, 8)])
def test_rms_norm(backend, dtype, rows, hidden):
    x, weight, grad = (
        randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(rows, hidden), (hidden,), (rows, hidden)])
    )
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = exact_norm(wide_x, wide_weight, 1e-6)
    exact.backward(grad.double())
    out, scales = NORM[backend](x, weight, 1e-6)
    check(out, exact.detach(), dtype)
    x_grad, weight_grad = NORM_BACK[backend](grad, x, weight, scales)
    assert x_grad.dtype == weight_grad.dtype == dtype
    check(x_grad, wide_x.grad, dtype)
    check(weight_grad, wide_weight.grad, dtype, loose=10)  # it is as large as the root of the rows


@pytest.mark.parametrize(("backend", "dtype"), cases(ROTATE))
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (5, 3, 24), (4, 9, 64), (0, 2, 8)])
def test_rope(backend, dtype, tokens, heads, width):
    x = randn(tokens, heads, width, seed=0, dtype=dtype)
    angles = randn(tokens, width // 2, seed=1)
    first, second = x.double().chunk(2, dim=-1)
    whole = torch.complex(first, second) * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    rotated = ROTATE[backend](x, angles.cos(), angles.sin())
    assert rotated.dtype == dtype
    check(rotated, torch.cat((whole.real, whole.imag), dim=-1), dtype)
    check(ROTATE[backend](rotated, angles.cos(), angles.sin(), back=True), x.double(), dtype)


@pytest.mark.parametrize(("backend", "dtype"), cases(GATE))
@pytest.mark.parametrize("shape", [(1,), (7, 300), (0, 4)])
def test_swiglu(backend, dtype, shape):
    gate, up, grad = (randn(*shape, seed=seed, dtype=dtype) for seed in range(3))
    wide_gate, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = torch.nn.functional.silu(wide_gate) * wide_up
    exact.backward(grad.double())
    check(GATE[backend](gate, up), exact.detach(), dtype)
    gate_grad, up_grad = GATE_BACK[backend](grad, gate, up)
    check(gate_grad, wide_gate.grad, dtype)
    check(up_grad, wide_up.grad, dtype)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rope(x, angles.cos(), angles.sin()), (x,))
    assert torch.autograd.gradcheck(swiglu, (x, torch.randn_like(x, requires_grad=True)))


@pytest.mark.parametrize("implementation", ["triton" if is_interpreted() or DEVICE.type == "cuda" else "torch"])
def test_a_block_of_all_three_has_the_gradients_of_autograd(implementation):
    """Through ``autograd``, on inputs that are not contiguous."""

    def block(x, weight, norm, rotate, gate):
        heads = rotate(norm(x, weight, 1e-5), angles.cos(), angles.sin())
        return gate(*heads.chunk(2, dim=1)).square().sum()

    angles = randn(5, 4, seed=2)
    x, weight = randn(4, 5, 8, seed=0).transpose(0, 1).requires_grad_(), randn(8, seed=1).requires_grad_()
    block(x, weight, rms_norm, rope, swiglu).backward()
    found = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None

    def rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    block(x, weight, exact_norm, rotate, lambda gate, up: torch.nn.functional.silu(gate) * up).backward()
    torch.testing.assert_close(found[0], x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], weight.grad, rtol=1e-4, atol=1e-4)
