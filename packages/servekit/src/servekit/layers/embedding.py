"""The vocabulary at both ends: token embeddings and logits, spread over ranks by token id."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding

from servekit.layers.kernels import Kernels
from servekit.layers.parallel import Ranks, shard
from servekit.layers.weights import Weights


class VocabParallelEmbedding:
    """Each rank has the embeddings of a range of token ids; the others' are zero in its sum."""

    def __init__(self, weights: Weights, name: str, vocab_size: int, hidden_size: int) -> None:
        self.ranks: Ranks = weights.ranks
        self.kernels = weights.kernels
        whole = weights.read_embeddings(name, vocab_size, hidden_size, lambda w: shard(w, 0, weights.ranks))
        self.weight = weights.settle(whole)
        self.first = self.ranks.rank * self.weight.shape[0]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """``[tokens]`` int64 -> ``[tokens, hidden]``."""
        if self.ranks.world_size == 1:
            return embedding(token_ids, self.weight)
        local = token_ids - self.first
        mine = (local >= 0) & (local < self.weight.shape[0])
        found = embedding(local.clamp(0, self.weight.shape[0] - 1), self.weight)
        return self.ranks.all_reduce(found * mine[:, None])


class LogitsHead:
    """Logits over the whole vocabulary; tied to ``embeddings`` or with a matrix of its own."""

    def __init__(self, ranks: Ranks, weight: Tensor, kernels: Kernels) -> None:
        self.ranks = ranks
        self.weight = weight
        self._product = kernels.linear_of(weight, None)

    @classmethod
    def tied(cls, embeddings: VocabParallelEmbedding) -> LogitsHead:
        return cls(embeddings.ranks, embeddings.weight, embeddings.kernels)

    @classmethod
    def read(cls, weights: Weights, name: str, vocab_size: int, hidden_size: int) -> LogitsHead:
        whole = weights.read_embeddings(name, vocab_size, hidden_size, lambda w: shard(w, 0, weights.ranks))
        return cls(weights.ranks, weights.settle(whole), weights.kernels)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab]`` float32."""
        return self.ranks.all_gather(self._product(hidden), dim=-1).float()
