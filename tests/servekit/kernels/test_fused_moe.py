"""The experts of a mixture: every implementation against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases, multiplies_float8

from common_platform.errors import ConfigError
from common_platform.kernels import is_interpreted
from servekit.kernels.fused_moe.experts import quantize_experts
from servekit.kernels.fused_moe.shared import join, route_to_shared
from servekit.kernels.quantize.reference import quantize

MOE = backends("servekit.kernels.fused_moe", "fused_moe", of=("reference", "sorted"))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
KINDS = ["dense", "int8", "w8a8", "int4", "fp8"]
SHAPES = [(1, 2, 5, 72, 40), (19, 3, 6, 136, 72), (40, 1, 3, 64, 128)]  # tokens, top_k, experts, hidden, inner


@pytest.fixture(autouse=True)
def _round_to_float8_as_a_device_does(monkeypatch):
    """The interpreter's own rounding to float8 forgets to carry."""
    if is_interpreted() and "triton" in MOE:
        from servekit.kernels.fused_moe import triton_backend

        monkeypatch.setattr(triton_backend, "quantize", quantize)


def make_inputs(tokens, top_k, num_experts, hidden, inner, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).to(DEVICE)
    whole = torch.randn(num_experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    gate_up = quantize_experts(whole.to(dtype).to(DEVICE), kind, group=64, parts=2)
    whole = torch.randn(num_experts, hidden, inner, generator=generator) * inner**-0.5
    down = quantize_experts(whole.to(dtype).to(DEVICE), kind, group=32)
    weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
    order = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)]
    return x, torch.stack(order).to(torch.int32).to(DEVICE), weights, gate_up, down


def exact(x, experts, weights, gate_up, down, shared=None):
    """A token and a slot at a time, in float64; eight-bit activations are the reference's."""

    def linear(row, matrix, rounds):
        if rounds:
            kind, group = rounds[0], rounds[1] or len(row)
            values, scales = quantize(row[None].to(x.dtype), kind, group)
            row = (values.double() * scales.double().repeat_interleave(group, dim=1)[:, : len(row)])[0]
        return matrix @ row

    whole = [[w.weight_of(expert).double() for w in (gate_up, down)] for expert in range(gate_up.shape[0])]
    out = torch.zeros(x.shape, dtype=torch.float64) if shared is None else shared.double().cpu()
    rounds = (torch.float8_e4m3fn, 128) if hasattr(gate_up, "parts") else ()
    rounds = (torch.int8, 0) if getattr(gate_up, "rounds_inputs", False) else rounds
    for token, slots in enumerate(experts.tolist()):
        for slot, expert in enumerate(slots):
            if 0 <= expert < gate_up.shape[0]:
                gate, up = linear(x[token].double(), whole[expert][0], rounds).chunk(2)
                inner = (torch.nn.functional.silu(gate) * up).to(x.dtype).double()
                out[token] += (linear(inner, whole[expert][1], rounds) * weights[token, slot].double()).cpu()
    return out


def check(backend, dtype, inputs, shared=None, loose=1.0):
    actual = MOE[backend](*inputs, shared)
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype] * loose
    torch.testing.assert_close(actual.double().cpu(), exact(*inputs, shared), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("backend", "dtype"), cases(MOE))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(backend, dtype, shape, kind):
    if backend == "triton" and kind == "fp8" and not multiplies_float8():
        pytest.skip("this device does not have float8")
    may_go_either_way = {"fp8": (2e3, 20.0), "w8a8": (1e3, 10.0)}.get(kind, (1.0, 1.0))  # roundings to eight bits
    loose = may_go_either_way[dtype != torch.float32]
    check(backend, dtype, make_inputs(*shape, dtype, kind), loose=loose)


@pytest.mark.parametrize(("backend", "dtype"), cases(MOE))
def test_shared_experts_are_added(backend, dtype):
    inputs = make_inputs(*SHAPES[1], dtype, "dense")
    check(backend, dtype, inputs, shared=torch.randn_like(inputs[0]))


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize(("backend", "dtype"), cases(MOE))
def test_shared_experts_among_the_routed_ones_are_shared_experts_beside_them(backend, dtype, kind):
    x, experts, weights, gate_up, down = make_inputs(*SHAPES[2], dtype, kind)
    _, _, _, shared_gate_up, shared_down = make_inputs(40, 1, 2, *SHAPES[2][3:], dtype, kind)
    both = join(gate_up, shared_gate_up), join(down, shared_down)
    slots = route_to_shared(experts, weights, 3, 2, 0.5)
    assert slots[0].shape == slots[1].shape == (40, 3)
    check(backend, dtype, (x, *slots, *both))
    half = torch.full((40, 2), 0.5, device=DEVICE)
    numbers = torch.arange(2, dtype=torch.int32, device=DEVICE).expand(40, 2)
    beside = MOE[backend](x, numbers.contiguous(), half, shared_gate_up, shared_down)
    apart = MOE[backend](x, experts, weights, gate_up, down, beside)
    tolerance = TOLERANCE[dtype] * 2
    torch.testing.assert_close(MOE[backend](x, *slots, *both), apart, rtol=tolerance, atol=tolerance)


def test_shared_experts_of_another_kind_or_size_are_refused():
    dense, int8 = (make_inputs(*SHAPES[2], torch.float32, kind)[3] for kind in ("dense", "int8"))
    other = make_inputs(*SHAPES[0], torch.float32, "dense")[3]
    for shared in (int8, other):
        with pytest.raises(ConfigError, match="shared_experts"):
            join(dense, shared)


@pytest.mark.parametrize(("backend", "dtype"), cases(MOE))
def test_one_expert_gets_all_and_the_others_none(backend, dtype):
    x, experts, weights, gate_up, down = make_inputs(35, 2, 5, 64, 32, dtype, "dense")
    check(backend, dtype, (x, torch.full_like(experts, 3), weights, gate_up, down))


@pytest.mark.parametrize(("backend", "dtype"), cases(MOE))
def test_experts_of_other_ranks_add_nothing(backend, dtype):
    x, experts, weights, gate_up, down = make_inputs(*SHAPES[1], dtype, "dense")
    check(backend, dtype, (x, torch.where(experts > 3, -1, experts), weights, gate_up, down))
    nowhere = MOE[backend](x, torch.full_like(experts, -1), weights, gate_up, down)
    assert not bool(nowhere.any())


@pytest.mark.parametrize("backend", list(MOE))
def test_no_tokens(backend):
    x, experts, weights, gate_up, down = make_inputs(*SHAPES[1], torch.float32, "dense")
    assert MOE[backend](x[:0], experts[:0], weights[:0], gate_up, down).shape == (0, 136)


@pytest.mark.parametrize("backend", list(MOE))
def test_what_is_in_the_rows_of_other_tokens_does_not_matter(backend):
    """Padding never leaks: a token has the same result alone, to the bit, where its tile has the same height."""
    x, experts, weights, gate_up, down = make_inputs(*SHAPES[1], torch.float32, "dense")
    together = MOE[backend](x, experts, weights, gate_up, down)
    poisoned = x.clone()
    poisoned[1:] = 5.0
    alone = MOE[backend](poisoned, experts, weights, gate_up, down)
    torch.testing.assert_close(alone[:1], together[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", list(MOE))
def test_experts_pass_through_transformers_own_layer(backend):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = pytest.importorskip("transformers").Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=2
    )
    layer = modeling.Qwen3MoeExperts(config)
    x, experts, weights, gate_up, down = make_inputs(17, 2, 6, 64, 48, torch.float32, "dense")
    with torch.no_grad():
        layer.gate_up_proj.copy_(gate_up.values)
        layer.down_proj.copy_(down.values)
        wanted = layer.to(DEVICE)(x, experts.long(), weights)
    torch.testing.assert_close(MOE[backend](x, experts, weights, gate_up, down), wanted, rtol=1e-4, atol=1e-5)


def test_any_routing_of_the_sorted_path_is_the_loops():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 9), st.integers(0, 999))
    def try_one(tokens, top_k, num_experts, seed):
        generator = torch.Generator().manual_seed(seed)
        experts = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator, dtype=torch.int32)
        x, _, _, gate_up, down = make_inputs(max(tokens, 1), 1, num_experts, 16, 8, torch.float32, "dense")
        weights = torch.rand(tokens, top_k, generator=generator)
        inputs = (x[:tokens].cpu(), experts, weights)
        torch.testing.assert_close(
            MOE["sorted"](*inputs, gate_up, down), MOE["reference"](*inputs, gate_up, down), rtol=1e-5, atol=1e-5
        )

    if DEVICE.type == "cpu":
        try_one()


def test_int4_and_float8_take_a_quarter_and_half_of_the_memory_of_bfloat16():
    def size(weights):
        parts = [getattr(weights, name) for name in weights.__slots__]
        return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))

    whole = torch.randn(4, 512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    dense = size(quantize_experts(whole, "dense"))
    assert dense / size(quantize_experts(whole, "fp8", parts=2)) > 1.99
    assert dense / size(quantize_experts(whole, "int8")) > 1.98
    assert dense / size(quantize_experts(whole, "int4", group=128)) > 3.85
