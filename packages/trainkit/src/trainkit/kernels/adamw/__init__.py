"""AdamW for many tensors in one launch."""

from trainkit.kernels.adamw.optimizer import FusedAdamW

__all__ = ["FusedAdamW"]
