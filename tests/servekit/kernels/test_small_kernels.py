"""The small kernels, each implementation against float64."""

from __future__ import annotations

import pytest
import torch

from servekit.kernels.kv_write import copy_blocks, kv_write
from servekit.kernels.rms_norm import fused, reference
from servekit.kernels.rotary import apply_rotary
from servekit.kernels.silu_and_mul import silu_and_mul

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (7, 1000), (128, 576), (3, 1)])
@pytest.mark.parametrize("kernel", [reference, fused])
def test_rms_norm(kernel, shape, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    exact = torch.nn.functional.rms_norm(x.double(), shape[1:], weight.double(), 1e-6)
    actual = kernel.rms_norm(x, weight, 1e-6)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=TOLERANCE[dtype] * 2, atol=TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [reference, fused])
def test_add_rms_norm_returns_the_sum_as_the_next_residual(kernel, dtype):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 33).to(dtype), torch.randn(5, 33).to(dtype), torch.ones(33).to(dtype)
    total = x + residual
    normed, new_residual = kernel.add_rms_norm(x.clone(), residual, weight, 1e-5)
    assert torch.equal(new_residual, total)
    assert torch.equal(normed, kernel.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 2 * 37).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    exact = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_and_mul(x).double(), exact, rtol=TOLERANCE[dtype] * 2, atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotary_keeps_lengths_and_depends_on_distance_only(rotary_dim):
    torch.manual_seed(0)
    frequencies = 1 / 100 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        angles = torch.cat((frequencies, frequencies))[None, None] * position
        return apply_rotary(x, angles.cos(), angles.sin())

    q, k = torch.randn(2, 1, 2, 16)
    torch.testing.assert_close(rotate(q, 9).norm(dim=-1), q.norm(dim=-1))
    near = (rotate(q, 5) * rotate(k, 3)).sum(-1)
    far = (rotate(q, 105) * rotate(k, 103)).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert torch.equal(rotate(q, 7)[..., rotary_dim:], q[..., rotary_dim:])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kv_write_and_block_copies_touch_only_their_places(dtype):
    cache = torch.zeros(2, 6, 4, 2, 8, dtype=dtype)
    keys, values = torch.randn(2, 3, 2, 8)
    places = torch.tensor([4 * 2 + 3, 4 * 5, 4 * 5 + 1])
    kv_write(cache, keys, values, places)
    assert torch.equal(cache[0, 2, 3], keys[0].to(dtype))
    assert torch.equal(cache[1, 5, 1], values[2].to(dtype))
    assert int((cache[0].abs().sum(dim=(-1, -2)) > 0).sum()) == 3
    copy_blocks(cache, torch.tensor([5]), torch.tensor([1]))
    assert torch.equal(cache[:, 1], cache[:, 5])
