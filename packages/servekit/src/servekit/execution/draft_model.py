"""A small model that drafts for a large one (Leviathan et al., ICML 2023).

It keeps keys and values of its own under the target's block tables: what the target computes it computes too, so
prefix hits, copies and preemptions hold for both. Tokens that it drafts may lie beyond the blocks that a row has; they
go to scratch blocks, a few for each row, and what is accepted is computed again with the target's next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from common_platform.errors import ConfigError
from servekit.core.config import CacheConfig
from servekit.core.facts import KVGroup
from servekit.execution.input_batch import InputBatch
from servekit.kernels.kv_write import copy_blocks
from servekit.kernels.paged_attention.metadata import StepRows
from servekit.layers.attention import StepInputs
from servekit.models.registry import CausalModel


class DraftModelProposer:
    """The most likely continuations, by greedy decoding of ``model``.

    Args:
        model: of the target's vocabulary, with full attention.
        target_groups: the target's KV groups: one, of full attention, so that its block tables serve for both.

    Raises:
        ConfigError: the models do not fit together.
    """

    def __init__(self, model: CausalModel, num_tokens: int, *, vocab_size: int, target_groups: list[KVGroup]) -> None:
        if model.vocab_size != vocab_size:
            limit = f"a model of the target's {vocab_size} tokens"
            raise ConfigError("speculative_config.model", f"{model.vocab_size} tokens", limit)
        for groups in (model.kv_groups, target_groups):
            if len(groups) != 1 or groups[0].kind != "full":
                kinds = [group.kind for group in groups]
                raise ConfigError("speculative_config.model", kinds, "full attention in both models; or method ngram")
        self.model = model
        self._num_tokens = num_tokens
        self.attentions = model.attentions
        self.models = [model]

    def bind(self, cache: CacheConfig, max_num_seqs: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the cache: the target's blocks, and scratch blocks behind them."""
        self._device = device
        self._block_size = cache.block_size
        self._first_scratch = cache.num_blocks
        self._scratch_of_row = self._num_tokens // cache.block_size + 2
        num_blocks = cache.num_blocks + max_num_seqs * self._scratch_of_row
        for attention in self.attentions:
            attention.bind(num_blocks, cache.block_size, dtype, device)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        if copies:
            pairs = torch.tensor([copy[1:] for copy in copies], device=self._device)
            for attention in self.attentions:
                for cache in attention.caches:
                    copy_blocks(cache, pairs[:, 0], pairs[:, 1])

    def computed(self, inputs: StepInputs) -> None:
        self.model.forward(StepInputs(inputs.token_ids, inputs.positions, inputs.rows, inputs.block_size))

    def propose(self, batch: InputBatch, slots: Sequence[int]) -> list[list[int]]:
        rows = np.asarray(slots)
        lasts = batch.num_tokens[rows] - 1
        room = np.minimum(batch.max_model_len - 1 - lasts, self._num_tokens)
        tables = self._tables(batch, rows)
        said = np.zeros((len(rows), self._num_tokens + 1), np.int64)  # each row's last token, and the drafts after it
        said[:, 0] = batch.token_ids[rows, lasts]
        for step in range(int(room.max(initial=0))):
            active = np.flatnonzero(step < room)
            said[active, step + 1] = self._next(tables[active], lasts[active] + step, said[active, step])
        return [row[1 : 1 + count].tolist() for row, count in zip(said, room, strict=True)]

    def _tables(self, batch: InputBatch, rows: np.ndarray) -> np.ndarray:
        """The rows' block tables, followed by the scratch blocks of each."""
        tables, lengths = batch.tables[0][rows], batch.table_lengths[0][rows]
        wide = np.concatenate((tables, np.zeros((len(rows), self._scratch_of_row), tables.dtype)), axis=1)
        for offset in range(self._scratch_of_row):
            wide[np.arange(len(rows)), lengths + offset] = self._first_scratch + rows * self._scratch_of_row + offset
        return wide

    def _next(self, tables: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        ones = np.ones(len(positions), np.int64)
        rows = StepRows(tables, positions, ones, 0)
        ids, places = torch.from_numpy(tokens).to(self._device), torch.from_numpy(positions).to(self._device)
        logits = self.model.logits(self.model.forward(StepInputs(ids, places, [rows], self._block_size)))
        return logits.argmax(dim=-1).cpu().numpy()
