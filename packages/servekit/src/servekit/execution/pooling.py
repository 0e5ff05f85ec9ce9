"""From the hidden states of a prompt to what an embedding request returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POOLINGS = ("last", "mean", "all")


class Pool:
    """One request's hidden states, chunk by chunk; float32 whatever the model's type.

    Args:
        kind: ``last`` token's state, their ``mean``, or ``all`` of them.
        num_tokens: of the prompt.
    """

    def __init__(self, kind: str, num_tokens: int) -> None:
        self._kind = kind
        self._num_tokens = num_tokens
        self._pieces: list[Tensor] = []

    def add(self, states: Tensor, start: int) -> list[Any]:
        """Take in ``states`` ``[tokens, hidden]`` of the positions from ``start`` on; the answer with the last one."""
        states = states.float()
        done = start + len(states) >= self._num_tokens
        if self._kind == "last":
            return states[-1].tolist() if done else []
        self._pieces.append(states.sum(dim=0) if self._kind == "mean" else states.clone())
        if not done:
            return []
        if self._kind == "all":
            return torch.cat(self._pieces).tolist()
        return (torch.stack(self._pieces).sum(dim=0) / self._num_tokens).tolist()
