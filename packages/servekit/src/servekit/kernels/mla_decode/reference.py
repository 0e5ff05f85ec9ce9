"""Latent attention in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.quantize.reference import quantize


def mla_decode(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    latent: int,
    scale: float,
    *,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in the latent space: all heads read one compressed key, whose first part is the value too.

    Args:
        query: ``[rows, heads, latent + rope]``, what ``absorb`` made of the heads' queries, then their rotated part.
        cache: ``[num_blocks, block_size, latent + rope]``: a token's normalised latent, then its rotated key.
        tables: ``[rows, max_blocks]`` int32, the blocks of each row; entries past its context are not read.
        contexts: ``[rows]`` int32, tokens of each row, the new one included.
        latent: columns of the latent (``kv_lora_rank``).
        scale: of the scores: ``(nope + rope) ** -0.5`` of the uncompressed head, and YaRN's factor where there is one.
        kv_scales: ``[num_blocks, block_size, 2]`` float32, of a cache of 8-bit numbers: what a token's latent and its
            rotated key are multiplied by (``compress``); None where the cache has the numbers themselves.

    Returns:
        ``[rows, heads, latent]`` in the dtype of ``query``, for ``project``; and ``[rows, heads]`` float32, the
        logarithm of the sum of the exponentials of the scores. A row without context gives zeros and minus infinity.

    Source: DeepSeek-V2, 2024, 2.1 and appendix C: the up-projections are absorbed into the query and the output.
    """
    rows, heads, _ = query.shape
    block_size = cache.shape[1]
    out = query.new_zeros(rows, heads, latent)
    log_sums = torch.full((rows, heads), float("-inf"), dtype=torch.float32, device=query.device)
    for row, context in enumerate(contexts.tolist()):
        if context:
            blocks = tables[row, : -(-context // block_size)].long()
            keys = cache[blocks].flatten(0, 1)[:context].float()
            if kv_scales is not None:
                widths = torch.tensor([latent, keys.shape[1] - latent], device=keys.device)
                keys *= kv_scales[blocks].flatten(0, 1)[:context].repeat_interleave(widths, dim=1)
            scores = query[row].float() @ keys.t() * scale  # [heads, context]
            log_sums[row] = scores.logsumexp(dim=-1)
            out[row] = (scores.softmax(dim=-1) @ keys[:, :latent]).to(query.dtype)
    return out, log_sums


def compress(tokens: Tensor, latent: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[tokens, latent + rope]`` in 8 bits, and ``[tokens, 2]`` float32: the scales of latents and rotated keys."""
    parts = [quantize(part, dtype, part.shape[1]) for part in (tokens[:, :latent], tokens[:, latent:])]
    values = torch.cat([values.view(torch.uint8) for values, _ in parts], dim=1).view(dtype)
    return values, torch.cat([scales for _, scales in parts], dim=1)


def absorb(query: Tensor, key_up: Tensor) -> Tensor:
    """Queries of the uncompressed heads, moved to where keys are compressed.

    Args:
        query: ``[rows, heads, nope]``.
        key_up: ``[heads, nope, latent]``, the key rows of ``kv_b_proj``.

    Returns:
        ``[rows, heads, latent]``: its product with a latent is the product of ``query`` with the uncompressed key.
    """
    return torch.bmm(query.transpose(0, 1), key_up).transpose(0, 1)


def project(out: Tensor, value_up: Tensor) -> Tensor:
    """``[rows, heads, latent]`` by ``value_up`` ``[heads, value, latent]`` (value rows of ``kv_b_proj``): values."""
    return torch.bmm(out.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)
