"""A matrix product with a weight, and its bias."""

from servekit.kernels.linear.reference import Linear, linear_of

__all__ = ["Linear", "linear_of"]
