"""Attention to some keys and attention to others made into attention to all."""

from servekit.kernels.merge_attention.reference import merge_attention

__all__ = ["merge_attention"]
