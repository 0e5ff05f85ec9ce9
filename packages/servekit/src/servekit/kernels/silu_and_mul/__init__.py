"""The gate of SwiGLU."""

from servekit.kernels.silu_and_mul.reference import silu_and_mul

__all__ = ["silu_and_mul"]
