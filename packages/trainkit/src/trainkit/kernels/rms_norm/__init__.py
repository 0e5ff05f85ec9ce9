"""Root mean square normalisation with its gradient."""

from trainkit.kernels.rms_norm.function import rms_norm

__all__ = ["rms_norm"]
