"""Rotary position embedding, and the new keys and values into the paged cache, in one pass over a step's tokens."""

from servekit.kernels.rope_kv_write.reference import rope_kv_write

__all__ = ["rope_kv_write"]
