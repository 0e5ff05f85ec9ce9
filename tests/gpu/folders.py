"""Llama-shaped models of random weights, with a tokenizer of numbers: made on the spot, nothing is fetched."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of a Llama's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 8192

    @property
    def num_parameters(self) -> int:
        width = self.hidden_size // self.num_attention_heads
        kv = self.num_key_value_heads * width
        layer = self.hidden_size * (2 * self.hidden_size + 2 * kv + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size


SHAPES = {
    "tiny": Shape(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
    ),
    "small": Shape(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
    ),
    "1b": Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "8b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


def config_of(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return asdict(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_folder(path: Path, shape: Shape, dtype: torch.dtype, device: torch.device) -> Path:
    """A model folder; weights are drawn on ``device`` and large enough that its distributions are not flat."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_of(shape, dtype)))
    write_tokenizer(path, shape.vocab_size)
    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}
    for part, layers in enumerate(_parts(shape)):
        name = f"model-{part:05d}.safetensors"
        tensors = {key: _drawn(size, dtype, device, generator) for key, size in layers.items()}
        save_file(tensors, path / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer whose words are t0, t1 and so on."""
    vocabulary = {f"t{number}": number for number in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (path / "tokenizer.json").write_text(json.dumps(empty | tokenizer))


def _drawn(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    scale = 2.0 * size[1] ** -0.5
    return torch.randn(size, dtype=torch.float32, device=device, generator=generator).mul_(scale).to(dtype).cpu()


def _parts(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file: the vocabulary's, then eight layers at a time."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv = shape.num_key_value_heads * (hidden // shape.num_attention_heads)
    parts: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (shape.vocab_size, hidden),
            "lm_head.weight": (shape.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for layer in range(shape.num_hidden_layers):
        if layer % 8 == 0:
            parts.append({})
        at = f"model.layers.{layer}"
        parts[-1] |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return parts
