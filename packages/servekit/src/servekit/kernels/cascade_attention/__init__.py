"""Decode attention of rows that share their first tokens: the shared keys are read once for all rows."""

from servekit.kernels.cascade_attention.reference import cascade_attention

__all__ = ["cascade_attention"]
