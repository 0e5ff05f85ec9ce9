"""Routing by Triton: one program for some tokens, no sort, nothing written but the answer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work
from servekit.kernels.moe_routing.reference import TINY
from servekit.kernels.moe_routing.rule import Routing

ELEMENTS = 1024  # scores of a program


@triton.jit
def _best(scores, open_, columns, NONE: tl.constexpr):
    """The highest of each row's open scores, and the lowest column that has it; ``NONE`` where none can be told."""
    highest = tl.max(tl.where(open_, scores, float("-inf")), axis=1)
    place = tl.min(tl.where(open_ & (scores == highest[:, None]), columns[None, :], NONE), axis=1)
    return highest, place


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    tokens,
    experts,
    scale,
    tiny,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,  # a group's score is the sum of its two best
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,  # powers of two, at least as many
    GROUPS_UP: tl.constexpr,
    TOP_K_UP: tl.constexpr,
):
    rows = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    columns = tl.arange(0, EXPERTS)
    is_open = (columns < experts)[None, :] & (rows >= 0)[:, None]
    lines = logits_ptr + tl.minimum(rows, tokens - 1)[:, None] * experts  # those past the end do the last one again
    logits = tl.load(lines + columns[None, :], mask=is_open, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + columns, mask=columns < experts, other=0.0)[None, :]
    if TOP_GROUPS < GROUPS:
        group_of = columns // (experts // GROUPS)
        groups = tl.arange(0, GROUPS_UP)
        group_scores = tl.full((TOKENS, GROUPS_UP), float("-inf"), dtype=tl.float32)
        for group in range(GROUPS):
            members = is_open & (group_of == group)[None, :]
            score, place = _best(choice, members, columns, EXPERTS)
            if BEST_TWO:
                others = members & (columns[None, :] != place[:, None])
                second, _unused = _best(choice, others, columns, EXPERTS)
                score += tl.where(tl.sum(others.to(tl.int32), axis=1) > 0, second, 0.0)
            group_scores = tl.where(groups[None, :] == group, score[:, None], group_scores)
        open_groups = (groups < GROUPS)[None, :] & (rows >= 0)[:, None]
        in_best = tl.zeros((TOKENS, EXPERTS), dtype=tl.int1)
        for _ in range(TOP_GROUPS):
            _unused, best_group = _best(group_scores, open_groups, groups, GROUPS_UP)
            in_best = in_best | (group_of[None, :] == best_group[:, None])
            open_groups = open_groups & (groups[None, :] != best_group[:, None])
        is_open = is_open & in_best
    slots = tl.arange(0, TOP_K_UP)
    chosen = tl.zeros((TOKENS, TOP_K_UP), dtype=tl.int32)
    weights = tl.zeros((TOKENS, TOP_K_UP), dtype=tl.float32)
    for slot in range(TOP_K):
        _unused, place = _best(choice, is_open, columns, EXPERTS)
        place = tl.minimum(place, experts - 1)  # logits that are not numbers still name an expert
        weight = tl.sum(tl.where(columns[None, :] == place[:, None], scores, 0.0), axis=1)
        chosen = tl.where(slots[None, :] == slot, place[:, None], chosen)
        weights = tl.where(slots[None, :] == slot, weight[:, None], weights)
        is_open = is_open & (columns[None, :] != place[:, None])
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + tiny)
    places = rows[:, None] * TOP_K + slots[None, :]
    real = (rows < tokens)[:, None] & (slots < TOP_K)[None, :]
    tl.store(weights_ptr + places, weights * scale, mask=real)
    tl.store(experts_ptr + places, chosen, mask=real)


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``reference.route``."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=logits.device)
    if not tokens:
        return weights, chosen
    wide = triton.next_power_of_2(experts)
    rows = max(ELEMENTS // wide, 1)
    _route[(triton.cdiv(tokens, rows),)](
        logits,
        bias,
        weights,
        chosen,
        tokens,
        experts,
        routing.scale,
        TINY,
        **_constants(routing, rows),
        num_warps=4,
    )
    return weights, chosen


def _constants(routing: Routing, rows: int) -> dict[str, int | bool]:
    return {
        "SIGMOID": routing.scoring == "sigmoid",
        "GROUPS": routing.groups,
        "TOP_GROUPS": routing.top_groups,
        "BEST_TWO": routing.group_score == "top2",
        "RENORMALIZE": routing.renormalize,
        "TOP_K": routing.top_k,
        "TOKENS": rows,
        "EXPERTS": triton.next_power_of_2(routing.num_experts),
        "GROUPS_UP": triton.next_power_of_2(routing.groups),
        "TOP_K_UP": triton.next_power_of_2(routing.top_k),
    }


def _specialization(name: str, routing: Routing, *, bias: bool) -> Specialization:
    rows = ELEMENTS // triton.next_power_of_2(routing.num_experts)
    pointers = {"logits_ptr": "*fp32", "weights_ptr": "*fp32", "experts_ptr": "*i32"}
    scalars = {"tokens": "i32", "experts": "i32:16", "scale": "fp32", "tiny": "fp32"}
    constants = _constants(routing, rows)
    return Specialization(
        kernel=_route,
        name=name,
        signature=pointers | scalars | ({"bias_ptr": "*fp32"} if bias else {}),
        constants=constants if bias else constants | {"bias_ptr": None},
    )


SPECIALIZATIONS = (
    _specialization("softmax, 8 of 128", Routing(num_experts=128, top_k=8), bias=False),
    _specialization(
        "sigmoid, 8 of 256, 4 of 8 groups",
        Routing(num_experts=256, top_k=8, scoring="sigmoid", groups=8, top_groups=4, scale=2.5),
        bias=True,
    ),
)

WORKS = (
    Work(
        operation="moe_routing (route)",
        shape="8192 tokens, 8 of 256 experts",
        bytes=8192 * (256 * 4 + 8 * 8),
        flops=8192 * 256 * 24,
        bound="bandwidth",
        target=0.3,
    ),
)
