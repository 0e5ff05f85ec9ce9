"""What scripts take from ``lightning.pytorch.utilities``."""

from trainkit.callbacks.grad_norm import grad_norm
from trainkit.data.combined import CombinedLoader
from trainkit.data.seed import seed_everything
from trainkit.ranks import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["CombinedLoader", "grad_norm", "rank_zero_info", "rank_zero_only", "rank_zero_warn", "seed_everything"]
