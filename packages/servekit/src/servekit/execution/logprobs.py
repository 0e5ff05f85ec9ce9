"""What a caller sees of a distribution: a token's logprob, its rank, and the most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from servekit.core.plan import TokenLogprob


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """The logprob and rank of each row's token, and its ``top[i]`` most likely ones."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    most = max(top)
    values, ids = logprobs.topk(most) if most else (logprobs[:, :0], ranks[:, None][:, :0])
    return [
        TokenLogprob(token, value, rank, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, value, rank, row_ids, row_values, count in zip(
            token_ids, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), top, strict=True
        )
    ]
