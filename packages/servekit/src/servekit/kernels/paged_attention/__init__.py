"""Attention of new tokens to all tokens before them, whose keys and values lie in blocks (Kwon et al., SOSP 2023)."""

from servekit.kernels.paged_attention.metadata import AttentionMetadata
from servekit.kernels.paged_attention.sdpa import paged_attention

__all__ = ["AttentionMetadata", "paged_attention"]
