"""How a family of models routes its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from common_platform.errors import ConfigError

SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Top-k routing.

    Mixtral: ``renormalize``. Qwen3-MoE: ``renormalize`` as its ``norm_topk_prob``. DeepSeek-V2: ``groups`` scored by
    their ``max``, ``scale``. DeepSeek-V3: ``sigmoid``, ``groups`` scored by ``top2``, ``renormalize``, ``scale``.
    """

    num_experts: int
    top_k: int  # experts of a token
    scoring: str = "softmax"  # of the logits, over all experts | "sigmoid", each alone
    groups: int = 1  # equal runs of experts
    top_groups: int = 1  # of them, those that a token may choose from
    group_score: str = "top2"  # the sum of a group's two best | "max", its best
    renormalize: bool = True  # the weights of a token's experts add up to one (before ``scale``)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ConfigError("routing.scoring", self.scoring, f"one of {SCORINGS}")
        if self.group_score not in GROUP_SCORES:
            raise ConfigError("routing.group_score", self.group_score, f"one of {GROUP_SCORES}")
        if self.num_experts < 1:
            raise ConfigError("routing.num_experts", self.num_experts, "1 or more")
        if self.groups < 1 or self.num_experts % self.groups:
            raise ConfigError("routing.groups", self.groups, f"a divisor of {self.num_experts} experts")
        if not 1 <= self.top_groups <= self.groups:
            raise ConfigError("routing.top_groups", self.top_groups, f"1..{self.groups}")
        reachable = self.num_experts // self.groups * self.top_groups
        if not 1 <= self.top_k <= reachable:
            raise ConfigError("routing.top_k", self.top_k, f"1..{reachable}, the experts in the chosen groups")
