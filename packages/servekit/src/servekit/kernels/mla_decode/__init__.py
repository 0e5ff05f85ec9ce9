"""Attention of one new token a row to compressed keys and values (multi-head latent attention)."""

from servekit.kernels.mla_decode.reference import absorb, compress, mla_decode, project

__all__ = ["absorb", "compress", "mla_decode", "project"]
