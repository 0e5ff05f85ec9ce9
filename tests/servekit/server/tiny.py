"""A tiny random Llama with a byte-level tokenizer and a chat template, as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

MAX_MODEL_LEN = 1024
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<s>{{ message['role'] }} {{ message.get('name', '') }}\n"
    "{{ message['content'] }}</s>\n{% endfor %}"
    "{% if loud %}LOUD{% endif %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_tiny_model(folder: Path) -> Path:
    """The folder, filled; the same weights each time."""
    torch.manual_seed(0)
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _byte_tokenizer() -> Tokenizer:
    """One token a byte, and the two special ones: every text can be written, no token is a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {char: index + 2 for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
