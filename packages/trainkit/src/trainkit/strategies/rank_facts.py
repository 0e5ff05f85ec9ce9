"""Where a process stands among the ranks, for whoever has a strategy."""

from __future__ import annotations

from trainkit.strategies.base import Strategy


class RankFacts:
    """Lightning's names for what the strategy knows."""

    strategy: Strategy

    @property
    def world_size(self) -> int:
        return self.strategy.world_size

    @property
    def global_rank(self) -> int:
        return self.strategy.rank

    @property
    def local_rank(self) -> int:
        return self.strategy.local_rank

    @property
    def is_global_zero(self) -> bool:
        return self.strategy.is_first
