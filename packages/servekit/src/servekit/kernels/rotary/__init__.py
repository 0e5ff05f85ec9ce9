"""Rotary position embedding of queries and keys."""

from servekit.kernels.rotary.reference import apply_rotary

__all__ = ["apply_rotary"]
