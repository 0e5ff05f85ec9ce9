"""Rotary position embedding with its gradient."""

from trainkit.kernels.rope.function import rope

__all__ = ["rope"]
