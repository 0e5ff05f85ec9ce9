"""Attention of one new token a row to compressed keys and values (multi-head latent attention)."""

from servekit.kernels.mla_decode.reference import absorb, mla_decode, project

__all__ = ["absorb", "mla_decode", "project"]
