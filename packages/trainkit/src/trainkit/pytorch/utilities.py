"""What scripts take from ``lightning.pytorch.utilities``."""

from trainkit.ranks import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]
