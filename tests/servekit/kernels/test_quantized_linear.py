"""Products with weights of few bits: every implementation against float64 of the same quantized numbers."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases, multiplies_float8

from common_platform.errors import ConfigError
from servekit.kernels.quantize import quantize
from servekit.kernels.quantized_linear import conversion
from servekit.kernels.quantized_linear import weights as layouts
from servekit.kernels.quantized_linear.reference import dequantize_blocks, dequantize_int4
from servekit.kernels.quantized_linear.tiles import Tiles, measured_tiles, tiles_for

FOLDER = "servekit.kernels.quantized_linear"
W8A8, W8A16 = backends(FOLDER, "w8a8_product"), backends(FOLDER, "w8a16_linear")
FP8_BLOCK, W4A16 = backends(FOLDER, "fp8_block_product"), backends(FOLDER, "w4a16_linear")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = [(1, 40, 200), (5, 130, 256), (17, 33, 129)]  # tokens, out, in
SPLITS = [1, 2]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


def make_inputs(tokens, out, width, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(out, width, generator=generator).mul(width**-0.5).to(DEVICE)
    return x, weight, torch.randn(out, generator=generator).to(dtype).to(DEVICE)


def check(actual, exact, dtype, least=0.0):
    assert actual.dtype == dtype
    tolerance = max(TOLERANCE[dtype], least)
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def float8_sums(kind=torch.float8_e4m3fn):
    """Tensor cores of Hopper add products of float8 in fourteen bits, 128 at a time."""
    return 1e-3 if DEVICE.type == "cuda" and kind != torch.int8 else 0.0


def cut(backend, splits):
    """Small tiles, so that a small shape has several; the reference has none."""
    return {} if backend == "reference" else {"tiles": Tiles(rows=16, cols=32, inner=64, splits=splits, num_stages=2)}


@pytest.mark.parametrize(("backend", "dtype"), cases(W8A8))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("splits", SPLITS)
def test_w8a8(backend, dtype, shape, kind, splits):
    if backend == "triton" and kind != torch.int8 and not multiplies_float8():
        pytest.skip("this device does not have float8")
    x, whole, bias = make_inputs(*shape, dtype)
    weight = layouts.quantize_channels(whole, kind)
    values, scales = quantize(x, kind, shape[2])
    exact = (values.double() * scales) @ (weight.values.double() * weight.scales[:, None]).t() + bias
    found = W8A8[backend](values, scales, weight, bias, dtype, **cut(backend, splits))
    check(found, exact, dtype, float8_sums(kind))


@pytest.mark.parametrize(("backend", "dtype"), cases(W8A16))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", SPLITS)
def test_w8a16(backend, dtype, shape, splits):
    x, whole, bias = make_inputs(*shape, dtype)
    weight = layouts.quantize_channels(whole, torch.int8)
    exact = x.double() @ (weight.values.double() * weight.scales[:, None]).t() + bias
    check(W8A16[backend](x, weight, bias, **cut(backend, splits)), exact, dtype)


@pytest.mark.parametrize(("backend", "dtype"), cases(FP8_BLOCK))
@pytest.mark.parametrize("shape", [*SHAPES, (3, 200, 300)])
@pytest.mark.parametrize("splits", SPLITS)
def test_fp8_blocks(backend, dtype, shape, splits):
    if backend == "triton" and not multiplies_float8():
        pytest.skip("this device does not have float8")
    x, whole, bias = make_inputs(*shape, dtype)
    weight = layouts.quantize_blocks(whole)
    values, scales = quantize(x, torch.float8_e4m3fn, 128)
    spread = scales.double().repeat_interleave(128, dim=1)[:, : shape[2]]
    exact = (values.double() * spread) @ dequantize_blocks(weight).double().t() + bias
    found = FP8_BLOCK[backend](values, scales, weight, bias, dtype, **cut(backend, splits))
    check(found, exact, dtype, float8_sums())


@pytest.mark.parametrize(("backend", "dtype"), cases(W4A16))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 128, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_w4a16(backend, dtype, shape, group, symmetric):
    x, whole, bias = make_inputs(*shape, dtype)
    weight = layouts.quantize_int4(whole, group or shape[2], symmetric=symmetric)
    exact = x.double() @ dequantize_int4(weight).double().t() + bias
    check(W4A16[backend](x, weight, bias, **cut(backend, 2 if group == 128 else 1)), exact, dtype)


@pytest.mark.parametrize(("backend", "dtype"), cases(W4A16))
def test_w4a16_in_the_order_of_its_groups(backend, dtype):
    x, whole, _ = make_inputs(3, 40, 256, dtype)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sorted_weight = layouts.quantize_int4(whole[:, order], 64)
    weight = layouts.Int4Weight(sorted_weight.packed, sorted_weight.scales, None, 64, 256, order)
    exact = x.double()[:, order] @ dequantize_int4(weight).double().t()
    check(W4A16[backend](x, weight), exact, dtype)


@pytest.mark.parametrize("backend", list(W4A16))
def test_no_tokens_give_no_rows(backend):
    x, whole, _ = make_inputs(0, 40, 128, torch.float32)
    assert W4A16[backend](x, layouts.quantize_int4(whole, 64)).shape == (0, 40)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_the_whole_product_is_near_the_unquantized_one(kind):
    x, whole, _ = make_inputs(8, 64, 512, torch.float32)
    exact = x @ whole.t()
    reference = backends(FOLDER, "w8a8_linear")["reference"]
    off = (reference(x, layouts.quantize_channels(whole, kind)) - exact).norm() / exact.norm()
    assert off < (0.02 if kind == torch.int8 else 0.06)
    blocks = backends(FOLDER, "fp8_block_linear")["reference"](x, layouts.quantize_blocks(whole))
    assert (blocks - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize("out", [64, 576, 4096, 151936])
@pytest.mark.parametrize("width", [64, 896, 4096, 14336])
def test_tiles_leave_no_split_without_work(tokens, out, width):
    tiles = tiles_for(tokens, out, width, 128)
    steps = -(-width // 128)
    assert tiles.splits == 1 or (tokens <= 16 and tiles.splits <= steps)
    assert tiles.rows >= min(tokens, 16)


# --- the layouts of others


def words(nibbles: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight values along ``dim`` in an int32; ``order[i]`` is which of the eight lies in nibble ``i``."""
    moved = nibbles.to(torch.int64).movedim(dim, -1)
    eights = moved.reshape(*moved.shape[:-1], -1, 8)
    packed = sum(eights[..., place] << (4 * i) for i, place in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).movedim(-1, dim)


@pytest.fixture
def matrix():
    """``[out, in]`` nibbles, and scales and zeros ``[groups, out]``, in groups of 64."""
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(0, 16, (24, 192), generator=generator)
    zeros = torch.randint(1, 16, (3, 24), generator=generator)
    scales = torch.rand(3, 24, generator=generator).half()
    group_of = torch.arange(192) // 64
    exact = (nibbles - zeros.t()[:, group_of]) * scales.float().t()[:, group_of]
    return nibbles, scales, zeros, exact


def test_packing_comes_back(matrix):
    nibbles, scales, zeros, exact = matrix
    weight = layouts.pack_int4(nibbles, scales, zeros, 64)
    assert torch.equal(layouts.unpack_int4(weight).long(), nibbles)
    assert torch.equal(dequantize_int4(weight), exact)


@pytest.mark.parametrize("one_less", [True, False])
def test_gptq(matrix, one_less):
    nibbles, scales, zeros, exact = matrix
    qzeros = words((zeros - 1 if one_less else zeros), 1)
    weight = conversion.from_gptq(
        words(nibbles.t(), 0), qzeros, scales, torch.arange(192) // 64, zeros_are_one_less=one_less
    )
    assert weight.order is None
    assert torch.equal(dequantize_int4(weight), exact)


def test_gptq_with_columns_quantized_out_of_order(matrix):
    nibbles, scales, zeros, _ = matrix
    g_idx = (torch.arange(192) // 64)[torch.randperm(192, generator=torch.Generator().manual_seed(2))]
    exact = (nibbles - zeros.t()[:, g_idx]) * scales.float().t()[:, g_idx]
    weight = conversion.from_gptq(words(nibbles.t(), 0), words(zeros - 1, 1), scales, g_idx)
    assert torch.equal(dequantize_int4(weight), exact[:, weight.order])


def test_awq(matrix):
    nibbles, scales, zeros, exact = matrix
    order = conversion.AWQ_ORDER
    weight = conversion.from_awq(words(nibbles.t(), 1, order), words(zeros, 1, order), scales)
    assert torch.equal(dequantize_int4(weight), exact)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(matrix, symmetric):
    nibbles, scales, zeros, exact = matrix
    if symmetric:
        zeros = torch.full_like(zeros, 8)
        exact = (nibbles - 8) * scales.float().t()[:, torch.arange(192) // 64]
    stored = None if symmetric else words(zeros.t(), 0)
    weight = conversion.from_compressed_tensors(words(nibbles, 1), scales.t(), (24, 192), stored)
    assert (weight.zeros is None) == symmetric
    assert torch.equal(dequantize_int4(weight), exact)


def test_groups_that_no_kernel_reads_are_refused(matrix):
    nibbles, scales, _, _ = matrix
    with pytest.raises(ConfigError, match="group_size"):
        layouts.pack_int4(nibbles, scales, None, 48)
    with pytest.raises(ConfigError, match="scales"):
        layouts.pack_int4(nibbles, scales, None, 32)
    uneven = (torch.arange(192) // 96).clamp_max(2)
    with pytest.raises(ConfigError, match="g_idx"):
        conversion.from_gptq(words(nibbles.t(), 0), words(torch.ones(3, 24), 1), scales, uneven)


def test_the_bits_of_float8_mean_the_same_on_mi300_with_twice_the_scale():
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn)  # all but the two that are not numbers
    converted, scales = layouts.as_fnuz(values, torch.tensor([0.5]))
    assert torch.equal(converted.float() * scales, values.float() * 0.5)


def test_what_was_measured_on_a_device_is_used(tmp_path, monkeypatch):
    from servekit.kernels import tuning

    config = {"block_m": 32, "block_n": 128, "num_warps": 8, "num_stages": 2}
    shape = {"tokens": 64, "out": 256, "width": 512}
    tuning.write(tmp_path, "cpu", {"w4a16": [{"shape": shape, "config": config}]})
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "device_name", lambda: "cpu")
    tuning._found.cache_clear()
    tuning.measured_on.cache_clear()
    try:
        safe = tiles_for(20, 256, 512, 128)
        found = measured_tiles("w4a16", safe, tokens=tuning.bucket(20), out=256, width=512)
        assert (found.rows, found.cols, found.num_warps, found.num_stages) == (32, 128, 8, 2)
        assert measured_tiles("w4a16", safe, tokens=tuning.bucket(20), out=256, width=640) == safe
        with pytest.raises(ConfigError, match=r"w4a16.block_n: got 128.*at most 64"):
            measured_tiles("w4a16", safe, most_cols=64, **shape)
    finally:
        tuning._found.cache_clear()
        tuning.measured_on.cache_clear()
