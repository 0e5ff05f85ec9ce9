"""The Llama family: Llama 1 to 3, SmolLM, Mistral, Qwen2 and Qwen3, which differ by biases, norms and windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common_platform.artifact import ModelFolder
from common_platform.errors import ArtifactConfigError
from servekit.core.facts import KVGroup
from servekit.layers.attention import Attention, StepInputs
from servekit.layers.embedding import LogitsHead, VocabParallelEmbedding
from servekit.layers.few_bits import Rounded
from servekit.layers.linear import ColumnParallelLinear, RowParallelLinear
from servekit.layers.norm import RMSNorm
from servekit.layers.parallel import share
from servekit.layers.rotary import RotaryEmbedding, rope_parameters
from servekit.layers.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """What config.json says, checked."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    rope: dict[str, Any]
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # one a layer, 0 for none

    @classmethod
    def read(cls, folder: ModelFolder) -> LlamaConfig:
        """Raises ArtifactConfigError naming the key and its value."""
        config, number = folder.config, folder.config_int
        kind = str(config.get("model_type"))
        hidden, heads = number("hidden_size", high=1 << 20), number("num_attention_heads", high=1 << 14)
        kv_heads = number("num_key_value_heads", high=heads, default=heads)
        if heads % kv_heads:
            raise ArtifactConfigError("config.json num_key_value_heads", kv_heads, f"a divisor of {heads}")
        if config.get("hidden_act", "silu") != "silu":
            raise ArtifactConfigError("config.json hidden_act", config["hidden_act"], "silu")
        bias = bool(config.get("attention_bias", False))
        num_layers = number("num_hidden_layers", high=1 << 10)
        eps = config.get("rms_norm_eps", 1e-6)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise ArtifactConfigError("config.json rms_norm_eps", eps, "a number in (0, 1)")
        return cls(
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size", high=1 << 24),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=number("head_dim", high=1 << 12, default=hidden // heads),
            max_positions=number("max_position_embeddings", high=1 << 26),
            eps=float(eps),
            rope=rope_parameters(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or kind == "qwen2",
            out_bias=bias and kind != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            windows=_windows(config, kind, num_layers),
        )


def _windows(config: dict[str, Any], kind: str, num_layers: int) -> tuple[int, ...]:
    """The window of each layer; the layers' types are spelt out in newer configs."""
    window = config.get("sliding_window")
    if not window or (kind.startswith("qwen") and not config.get("use_sliding_window", False)):
        return (0,) * num_layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == num_layers:
        return tuple(int(window) if kind == "sliding_attention" else 0 for kind in types)
    first = int(config.get("max_window_layers", 0)) if kind.startswith("qwen") else 0
    return tuple(int(window) if layer >= first else 0 for layer in range(num_layers))


def kv_groups_of(windows: tuple[int, ...]) -> list[KVGroup]:
    """Layers of one window share a block table."""
    groups = []
    for window in sorted(set(windows)):
        layers = [i for i, w in enumerate(windows) if w == window]
        groups.append(KVGroup(kind="sliding" if window else "full", window=window, layers=layers))
    return groups


class LlamaLayer:
    """Attention and a gated feed-forward network, each behind a norm."""

    def __init__(self, config: LlamaConfig, weights: Weights, index: int, group: int) -> None:
        at = f"model.layers.{index}"
        hidden, width = config.hidden_size, config.head_dim
        self.heads = share("num_attention_heads", config.num_heads, weights.ranks)
        self.kv_heads = share("num_key_value_heads", config.num_kv_heads, weights.ranks)
        self.width = width
        outs = [config.num_heads * width, config.num_kv_heads * width, config.num_kv_heads * width]
        names = [f"{at}.self_attn.{part}_proj" for part in "qkv"]
        self.input_norm = RMSNorm(weights, f"{at}.input_layernorm.weight", hidden, config.eps)
        self.qkv = ColumnParallelLinear(weights, names, hidden, outs, bias=config.qkv_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(weights, f"{at}.self_attn.q_norm.weight", width, config.eps)
            self.k_norm = RMSNorm(weights, f"{at}.self_attn.k_norm.weight", width, config.eps)
        self.attention = Attention(
            self.heads,
            self.kv_heads,
            width,
            scale=width**-0.5,
            group=group,
            kernel=weights.kernels.paged_attention,
            rope_kv_write=weights.kernels.rope_kv_write,
        )
        self.out = RowParallelLinear(weights, f"{at}.self_attn.o_proj", outs[0], hidden, bias=config.out_bias)
        self.post_norm = RMSNorm(weights, f"{at}.post_attention_layernorm.weight", hidden, config.eps)
        names = [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"]
        inner = config.intermediate_size
        self.gate_up = ColumnParallelLinear(weights, names, hidden, [inner, inner], bias=config.mlp_bias)
        self._silu_and_mul = weights.kernels.silu_and_mul_to_linear
        self.down = RowParallelLinear(weights, f"{at}.mlp.down_proj", inner, hidden, bias=config.mlp_bias)

    def __call__(self, x: Tensor, residual: Tensor | None, step: StepInputs) -> tuple[Tensor, Tensor]:
        normed, residual = self.input_norm.add_to_linear(x, residual)
        normed, residual = self.post_norm.add_to_linear(self._attend(normed, step), residual)
        return self.down(self._silu_and_mul(self.gate_up(normed))), residual

    def _attend(self, x: Tensor | Rounded, step: StepInputs) -> Tensor:
        tokens = len(x)
        turned = (self.heads + self.kv_heads) * self.width
        qkv = self.qkv(x)
        qk = qkv[:, :turned].view(tokens, -1, self.width)
        value = qkv[:, turned:].view(tokens, self.kv_heads, self.width)
        if self.q_norm and self.k_norm:
            qk = torch.cat((self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])), dim=1)
        out = self.attention.rotated(qk, value, step.angles["rope"], step)
        return self.out(out.reshape(tokens, -1))


class Llama:
    """A causal language model of the Llama family, this rank's shard of it."""

    def __init__(self, weights: Weights, max_positions: int) -> None:
        config = LlamaConfig.read(weights.folder)
        self.config = config
        self.vocab_size = config.vocab_size
        self.embed_size = config.hidden_size
        self.kv_groups = kv_groups_of(config.windows)
        group_of = {layer: i for i, group in enumerate(self.kv_groups) for layer in group.layers}
        self.embed = VocabParallelEmbedding(weights, "model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [LlamaLayer(config, weights, i, group_of[i]) for i in range(config.num_layers)]
        self.norm = RMSNorm(weights, "model.norm.weight", config.hidden_size, config.eps)
        if config.tied:
            weights.check_tied("lm_head.weight", "model.embed_tokens.weight")
            self.head = LogitsHead.tied(self.embed)
        else:
            self.head = LogitsHead.read(weights, "lm_head.weight", config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(
            config.rope, config.head_dim, max_positions, config.max_positions, weights.dtype, weights.device
        )
        self.attentions = [layer.attention for layer in self.layers]

    def forward(self, step: StepInputs) -> Tensor:
        step.angles["rope"] = self.rotary.at(step.positions)
        x, residual = self.embed(step.token_ids), None
        if step.given is not None:
            x = step.given.put(x)
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
