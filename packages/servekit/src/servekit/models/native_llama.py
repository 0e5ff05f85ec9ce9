"""The Llama family on the C++ kernels: recorded once as a program, replayed by one call a step.

What flows between the layers is float32; weights are float32, bfloat16, or 8 or 4 bits wide. Of several tensor-parallel
ranks each has its heads and its columns, and the program is cut where their sums meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common_platform.artifact import ModelFolder
from servekit.kernels.native import Cache, Epilogue, Format, Library, PackedWeight, Program, Rows, pack
from servekit.kernels.native.library import Pool
from servekit.layers.attention import Attention, StepInputs
from servekit.layers.parallel import shard, share
from servekit.layers.rotary import inverse_frequencies
from servekit.layers.weights import Weights
from servekit.models.llama import LlamaConfig, kv_groups_of
from servekit.models.registry import Likely

HEAD_UNIT = 16  # numbers of a head are padded to this many
MAX_HEAD_DIM = 512
SMALLEST_CAPACITY = 64  # tokens
INNER_GROUP = (
    32  # of an MLP's inner numbers of 8 bits: a few are far larger than the others, and a scale is theirs alone
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights."""

    input_norm: Tensor
    qkv: PackedWeight
    head_norms: tuple[Tensor, Tensor] | None
    out: PackedWeight
    post_norm: Tensor
    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True, slots=True)
class Recording:
    """The operations of a step of up to ``capacity`` tokens, in programs with sums over ranks between them.

    ``x`` [capacity, hidden] is where the embeddings stand, ``hidden`` where the last states come out, ``highest`` and
    ``ids`` [capacity] what is most likely after the tokens that a run picks; of one rank only.
    """

    cache: Tensor
    capacity: int
    programs: list[Program]
    x: Tensor
    hidden: Tensor
    partial: Tensor
    highest: NDArray[np.float32]
    ids: NDArray[np.int64]


class Operand:
    """What one operation writes and a product reads: 8-bit rows are written as floats first, for their scales."""

    def __init__(self, rows: Rows, capacity: int) -> None:
        self._rows = rows
        self.written = Rows(capacity, rows.cols) if rows.format is Format.I8 else rows

    def settled(self, program: Program) -> Rows:
        """The rows to read, after the operation that brings them there."""
        if self.written is not self._rows:
            program.convert(self.written, self._rows.cols, self._rows)
        return self._rows


class NativeLlama:
    """A ``CausalModel``: what ``models.llama.Llama`` computes, this rank's shard of it, on a CPU.

    Args:
        format: of the weights of linear layers; with 4 bits the vocabulary's matrix has 8.
        pool: threads that nobody else uses.
    """

    def __init__(self, weights: Weights, max_positions: int, library: Library, pool: Pool, format: Format) -> None:
        self._library, self._pool = library, pool
        self._weights = weights
        self._ranks = weights.ranks
        self._format = format
        config = LlamaConfig.read(weights.folder)
        self._heads = share("num_attention_heads", config.num_heads, self._ranks)
        self._kv_heads = share("num_key_value_heads", config.num_kv_heads, self._ranks)
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed_size = config.hidden_size
        self.kv_groups = kv_groups_of(config.windows)
        group_of = {layer: i for i, group in enumerate(self.kv_groups) for layer in group.layers}
        padded = -(-config.head_dim // HEAD_UNIT) * HEAD_UNIT
        self.attentions = [
            Attention(self._heads, self._kv_heads, padded, scale=config.head_dim**-0.5, group=group_of[layer])
            for layer in range(config.num_layers)
        ]
        self._load(weights)
        frequencies, factor = inverse_frequencies(config.rope, config.head_dim, config.max_positions)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        self._angles = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1).contiguous()
        self._recordings: dict[bool, Recording] = {}  # by whether embeddings are given
        self._record_head(1)

    @staticmethod
    def reason_against(folder: ModelFolder) -> str | None:
        """Why the kernels cannot run the model in ``folder``; None where they can."""
        width = LlamaConfig.read(folder).head_dim
        if width % 2 or width > MAX_HEAD_DIM:
            return f"head_dim is {width}, and they know even ones up to {MAX_HEAD_DIM}"
        return None

    def _load(self, weights: Weights) -> None:
        config, hidden = self.config, self.config.hidden_size
        table = weights.read_embeddings("model.embed_tokens.weight", config.vocab_size, hidden, lambda whole: whole)
        if config.tied:
            weights.check_tied("lm_head.weight", "model.embed_tokens.weight")
        self._table = (table if table.dtype in (torch.bfloat16, torch.float32) else table.float()).contiguous()
        self._layers = [self._read_layer(index) for index in range(config.num_layers)]
        self._norm = self._vector("model.norm.weight", hidden)
        head = self._table if config.tied else weights.read("lm_head.weight", (config.vocab_size, hidden))
        head = shard(head, 0, self._ranks)
        format = Format.I8 if self._format is Format.I4 else self._format  # errors here are seen in every logit
        self._head = pack(self._library, self._pool, format, [head])

    def _read_layer(self, index: int) -> Layer:
        config, at = self.config, f"model.layers.{index}"
        hidden, width = config.hidden_size, config.head_dim
        outs = [config.num_heads * width, config.num_kv_heads * width, config.num_kv_heads * width]
        qkv = {f"{at}.self_attn.{part}_proj": out for part, out in zip("qkv", outs, strict=True)}
        mlp = {f"{at}.mlp.{part}_proj": config.intermediate_size for part in ("gate", "up")}
        norms = [f"{at}.self_attn.{part}_norm.weight" for part in "qk"]
        return Layer(
            self._vector(f"{at}.input_layernorm.weight", hidden),
            self._linear(qkv, hidden, bias=config.qkv_bias),
            (self._vector(norms[0], width), self._vector(norms[1], width)) if config.qk_norm else None,
            self._row_linear(f"{at}.self_attn.o_proj", outs[0], bias=config.out_bias),
            self._vector(f"{at}.post_attention_layernorm.weight", hidden),
            self._linear(mlp, hidden, bias=config.mlp_bias, gated=True),
            self._row_linear(f"{at}.mlp.down_proj", config.intermediate_size, bias=config.mlp_bias),
        )

    def _vector(self, name: str, size: int) -> Tensor:
        return self._weights.read(name, (size,)).float().contiguous()

    def _linear(self, outs: dict[str, int], width: int, *, bias: bool, gated: bool = False) -> PackedWeight:
        """Matrices that read the same input: this rank's rows of each."""

        def rows(whole: Tensor) -> Tensor:
            return shard(whole, 0, self._ranks)

        parts = [self._weights.read(f"{name}.weight", (out, width), rows) for name, out in outs.items()]
        offsets = [self._weights.read(f"{name}.bias", (out,), rows) for name, out in outs.items()] if bias else []
        return pack(self._library, self._pool, self._format, parts, offsets, gated=gated)

    def _row_linear(self, name: str, width: int, *, bias: bool) -> PackedWeight:
        """A matrix that reads what the ranks have made: this rank's columns, and the bias once."""
        out = self.config.hidden_size
        part = self._weights.read(f"{name}.weight", (out, width), lambda whole: shard(whole, 1, self._ranks))
        offsets = [self._weights.read(f"{name}.bias", (out,))] if bias and self._ranks.rank == 0 else []
        return pack(self._library, self._pool, self._format, [part], offsets)

    def forward(self, step: StepInputs) -> Tensor:
        """The last hidden states, ``[tokens, hidden]`` float32: valid until the next call."""
        return self._run(step, None).hidden[: len(step.token_ids)]

    def forward_greedy(self, step: StepInputs, places: NDArray[np.int64]) -> tuple[Tensor, Likely | None]:
        """As ``forward``, and the most likely tokens after ``places``: valid until the next call; None of ranks."""
        recording, count = self._run(step, places), len(places)
        hidden = recording.hidden[: len(step.token_ids)]
        if self._ranks.world_size > 1:
            return hidden, None
        return hidden, Likely(recording.highest[:count], recording.ids[:count])

    def _run(self, step: StepInputs, places: NDArray[np.int64] | None) -> Recording:
        tokens, is_given = len(step.token_ids), step.given is not None
        recording = self._recordings.get(is_given)
        if recording is None or recording.cache is not self.attentions[0].cache or recording.capacity < tokens:
            capacity = max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
            recording = self._recordings[is_given] = self._record(capacity, looks_up=not is_given)
        if step.given is not None:
            recording.x[:tokens] = step.given.put(self._table[step.token_ids].float())
        for program in recording.programs[:-1]:
            program.run(step.token_ids, step.positions, step.rows)
            mine = recording.partial[:tokens]
            mine.copy_(self._ranks.all_reduce(mine))
        recording.programs[-1].run(step.token_ids, step.positions, step.rows, places)
        return recording

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab]`` float32: valid until the next call."""
        if len(hidden) > len(self._logits):
            self._record_head(1 << (len(hidden) - 1).bit_length())
        self._head_program.run_rows(hidden)
        mine = self._logits[: len(hidden)]
        return mine if self._ranks.world_size == 1 else self._ranks.all_gather(mine, dim=-1)

    def _record_head(self, capacity: int) -> None:
        program = Program(self._library, self._pool)
        x = Rows.input_of(self._head, self._library, capacity)
        out = Rows(capacity, share("vocab_size", self.vocab_size, self._ranks))
        program.convert(None, self.config.hidden_size, x)
        program.linear(x, self._head, out)
        self._head_program, self._logits = program, out.tensor()

    def _record(self, capacity: int, *, looks_up: bool) -> Recording:
        """The operations of a step, on the caches that are bound now.

        Args:
            looks_up: the embeddings in the vocabulary's matrix; else they are put where ``x`` is.
        """
        config, library, eps = self.config, self._library, self.config.eps
        first = self._layers[0]
        caches = [Cache(a.cache, config.head_dim, a.group, a.kv_scales) for a in self.attentions]
        padded = self.attentions[0].head_dim
        x, hidden = Rows(capacity, config.hidden_size), Rows(capacity, config.hidden_size)
        partial = Rows(capacity, config.hidden_size)
        normed = Rows.input_of(first.qkv, library, capacity)
        qkv = Rows(capacity, (self._heads + 2 * self._kv_heads) * config.head_dim)
        queries = Rows(capacity, self._heads * padded, caches[0].queries(library))
        attended = Operand(Rows.input_of(first.out, library, capacity), capacity)
        inner = Operand(Rows.input_of(first.down, library, capacity, INNER_GROUP), capacity)
        programs = [Program(library, self._pool)]

        def add_to_x(operand: Operand, weight: PackedWeight) -> None:
            """Where there are other ranks, their sums are added first: between two programs."""
            if self._ranks.world_size == 1:
                programs[-1].linear(operand.settled(programs[-1]), weight, x, Epilogue.ADD)
                return
            programs[-1].linear(operand.settled(programs[-1]), weight, partial)
            programs.append(Program(library, self._pool))
            programs[-1].add(partial, x)

        if looks_up:
            programs[-1].embed(self._table, x)
        for layer, attention, cache in zip(self._layers, self.attentions, caches, strict=True):
            window = self.kv_groups[attention.group].window
            program = programs[-1]
            program.norm(x, layer.input_norm, eps, normed)
            program.linear(normed, layer.qkv, qkv)
            program.rotary(qkv, self._heads, self._angles, layer.head_norms, eps, cache, queries)
            program.attention(queries, self._heads, cache, attended.written, scale=attention.scale, window=window)
            add_to_x(attended, layer.out)
            program = programs[-1]
            program.norm(x, layer.post_norm, eps, normed)
            program.linear(normed, layer.gate_up, inner.written, Epilogue.SWIGLU)
            add_to_x(inner, layer.down)
        programs[-1].norm(x, self._norm, eps, hidden)
        highest, ids = np.zeros(capacity, np.float32), np.zeros(capacity, np.int64)
        if self._ranks.world_size == 1:
            picked = Rows.input_of(self._head, library, capacity)
            programs[-1].pick(hidden, config.hidden_size, picked)
            programs[-1].highest(picked, self._head, self.vocab_size, ids, highest)
        bound = self.attentions[0].cache
        return Recording(bound, capacity, programs, x.tensor(), hidden.tensor(), partial.tensor(), highest, ids)
