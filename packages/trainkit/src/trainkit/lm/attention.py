"""Attention within each document of a packed row: no mask is made, and no score computed to be thrown away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common_platform.errors import ConfigError

NAME = "trainkit_by_document"  # in transformers' table of attention functions


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a packed row lie.

    Args:
        lengths: tokens of each, in their order; together the row's tokens.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("documents", self.lengths[:8], "1 token or more in each")

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def attend_by_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, scale: float, window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention of each document by itself.

    Args:
        query: ``[tokens, heads, head_dim]``.
        key, value: ``[tokens, kv_heads, head_dim]``; each serves ``heads / kv_heads`` query heads.
        window: a token sees itself and the ``window - 1`` before it.

    Returns:
        ``[tokens, heads, head_dim]``.
    """
    parts = [torch.split(part, list(documents.lengths)) for part in (query, key, value)]
    attended = [_attend(q, k, v, scale, window, dropout) for q, k, v in zip(*parts, strict=True)]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = (kv_heads, heads // kv_heads, tokens, -1)
    query = query.view(tokens, *grouped[:2], head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, tokens, head_dim]
    key, value = (part.transpose(0, 1)[:, None].expand(grouped) for part in (key, value))  # not copied
    mask = None
    if window is not None and window < tokens:
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
        mask = ones.tril().triu(1 - window)
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
    )
    return attended.permute(2, 0, 1, 3).reshape(tokens, heads, -1)


def by_document(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, documents: Documents | None = None,
    sliding_window: int | None = None, **other: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """``attend_by_document`` as transformers' models call attention: ``[1, heads, tokens, head_dim]`` in, ``[1, tokens,
    heads, head_dim]`` out.

    Raises:
        ConfigError: the model asks for what this attention does not do.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise ConfigError(f"attention.{name}", type(module).__name__, 'a model without it: packing="mask"')
    if documents is None or documents.num_tokens != query.shape[2] or query.shape[0] != 1:
        raise ConfigError("documents", tuple(query.shape), "one packed row and its documents")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    found = attend_by_document(query, key, value, documents, scale=scale, window=sliding_window, dropout=dropout)
    return found[None], None
