"""What scripts take from ``lightning.pytorch.utilities``."""

from trainkit.callbacks.grad_norm import grad_norm
from trainkit.data.combined import CombinedLoader
from trainkit.data.seed import seed_everything
from trainkit.pytorch.utilities import combined_loader, exceptions, grads, rank_zero, seed, types
from trainkit.pytorch.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = [
    "CombinedLoader",
    "combined_loader",
    "exceptions",
    "grad_norm",
    "grads",
    "rank_zero",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed",
    "seed_everything",
    "types",
]
