"""SwiGLU's gate with its gradient."""

from trainkit.kernels.swiglu.function import swiglu

__all__ = ["swiglu"]
