"""Routing: every implementation against float64, and against Transformers' routers on random weights."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

from common_platform.errors import ConfigError
from servekit.kernels.moe_routing import Routing

ROUTE = backends("servekit.kernels.moe_routing", "route")
ROUTINGS = {
    "mixtral": Routing(num_experts=8, top_k=2),
    "qwen": Routing(num_experts=60, top_k=4, renormalize=False),
    "deepseek-v2": Routing(
        num_experts=12, top_k=3, groups=4, top_groups=2, group_score="max", renormalize=False, scale=16.0
    ),
    "deepseek-v3": Routing(num_experts=24, top_k=4, scoring="sigmoid", groups=6, top_groups=3, scale=2.5),
    "groups of one": Routing(num_experts=6, top_k=2, groups=6, top_groups=2),
    "all": Routing(num_experts=5, top_k=5),
}


def exact(logits, routing, bias):
    """In float64, a token at a time, by Python's own sort."""
    logits = logits.double()
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    weights, experts = [], []
    for row, choice in zip(scores.tolist(), (scores if bias is None else scores + bias.double()).tolist(), strict=True):
        size = routing.num_experts // routing.groups
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(routing.groups)]
        value = [g[0] if routing.group_score == "max" else sum(g[:2]) for g in groups]
        best = sorted(range(routing.groups), key=lambda g: (-value[g], g))[: routing.top_groups]
        if routing.top_groups == routing.groups:
            best = list(range(routing.groups))
        open_ = [e for e in range(routing.num_experts) if e // size in best]
        chosen = sorted(open_, key=lambda e: (-choice[e], e))[: routing.top_k]
        total = sum(row[e] for e in chosen) if routing.renormalize else 1.0
        experts.append(chosen)
        weights.append([row[e] / total * routing.scale for e in chosen])
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(experts, dtype=torch.int32)


@pytest.mark.parametrize(("backend", "dtype"), cases(ROUTE))
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_float64(backend, dtype, name, tokens, with_bias):
    routing = ROUTINGS[name]
    generator = torch.Generator().manual_seed(tokens)
    spread = torch.arange(routing.num_experts) * 0.37  # no two logits of a row are near each other
    order = torch.stack([torch.randperm(routing.num_experts, generator=generator) for _ in range(tokens)] or [spread])
    logits = (spread[order.long()] if tokens else spread[None][:0]).to(dtype).to(DEVICE)
    bias = torch.rand(routing.num_experts, generator=generator).mul(0.2).to(DEVICE) if with_bias else None
    weights, experts = ROUTE[backend](logits, routing, bias)
    wanted_weights, wanted = exact(logits.cpu(), routing, None if bias is None else bias.cpu())
    assert weights.dtype == torch.float32
    assert experts.dtype == torch.int32
    assert torch.equal(experts.cpu(), wanted.view(tokens, routing.top_k))
    torch.testing.assert_close(weights.cpu().double(), wanted_weights.view(tokens, routing.top_k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "dtype"), cases(ROUTE))
def test_equal_scores_go_to_the_lower_numbers(backend, dtype):
    _, experts = ROUTE[backend](torch.zeros(3, 8, dtype=dtype, device=DEVICE), Routing(num_experts=8, top_k=3))
    assert experts.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("backend", list(ROUTE))
def test_experts_of_a_token_differ_even_where_only_one_has_a_score(backend):
    logits = torch.full((2, 8), float("-inf"), device=DEVICE)
    logits[:, 5] = 0.0
    weights, experts = ROUTE[backend](logits, Routing(num_experts=8, top_k=3))
    assert experts.tolist() == [[5, 0, 1]] * 2
    assert weights.tolist() == [[1.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 5, "groups": 4, "top_groups": 1}),
        ("groups", {"groups": 3}),
        ("top_groups", {"top_groups": 2}),
        ("scoring", {"scoring": "relu"}),
        ("group_score", {"group_score": "sum"}),
    ],
)
def test_what_cannot_be_routed_is_refused(field, change):
    with pytest.raises(ConfigError, match=rf"routing\.{field}"):
        Routing(**({"num_experts": 16, "top_k": 2} | change))


def check_router(router, routing, hidden, bias=None):
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)))
        logits, weights, experts = router(hidden)
    by_number = torch.zeros(len(hidden), routing.num_experts).scatter(1, experts, weights.float())
    for backend in ROUTE.values():
        ours, ids = backend(logits.to(DEVICE), routing, None if bias is None else bias.to(DEVICE))
        found = torch.zeros_like(by_number).scatter(1, ids.cpu().long(), ours.cpu())
        torch.testing.assert_close(found, by_number, rtol=1e-5, atol=1e-6)


def test_routes_as_mixtral_does():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = pytest.importorskip("transformers").MixtralConfig(
        hidden_size=32, num_local_experts=8, num_experts_per_tok=2
    )
    check_router(mixtral.MixtralTopKRouter(config), Routing(num_experts=8, top_k=2), torch.randn(50, 32))


@pytest.mark.parametrize("renormalize", [True, False])
def test_routes_as_qwen3_does(renormalize):
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = pytest.importorskip("transformers").Qwen3MoeConfig(
        hidden_size=32, num_experts=20, num_experts_per_tok=4, norm_topk_prob=renormalize
    )
    routing = Routing(num_experts=20, top_k=4, renormalize=renormalize)
    check_router(qwen.Qwen3MoeTopKRouter(config), routing, torch.randn(50, 32))


def test_routes_as_deepseek_v3_does():
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = pytest.importorskip("transformers").DeepseekV3Config(
        hidden_size=32, n_routed_experts=24, num_experts_per_tok=4, n_group=6, topk_group=3, routed_scaling_factor=2.5
    )
    router = deepseek.DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(torch.rand(24))
    routing = ROUTINGS["deepseek-v3"]
    check_router(router, routing, torch.randn(50, 32), router.e_score_correction_bias)
