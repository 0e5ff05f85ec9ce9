"""The gates of SwiGLU and GeGLU."""

from servekit.kernels.silu_and_mul.reference import gelu_and_mul, silu_and_mul

__all__ = ["gelu_and_mul", "silu_and_mul"]
