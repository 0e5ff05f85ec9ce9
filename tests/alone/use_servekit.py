"""servekit installed alone, without transformers: make a tiny Llama by hand and let it answer."""

import importlib.util
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from servekit import LLM, SamplingParams

if importlib.util.find_spec("trainkit"):
    raise SystemExit("trainkit is installed: this is not alone")
WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]
HIDDEN, INNER, VOCAB = 16, 32, len(WORDS)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
SHAPES = {
    "embed_tokens": (VOCAB, HIDDEN),
    "norm": (HIDDEN,),
    "layers.0.input_layernorm": (HIDDEN,),
    "layers.0.post_attention_layernorm": (HIDDEN,),
    "layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "layers.0.self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "layers.0.self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
    "layers.0.mlp.gate_proj": (INNER, HIDDEN),
    "layers.0.mlp.up_proj": (INNER, HIDDEN),
    "layers.0.mlp.down_proj": (HIDDEN, INNER),
}

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as home:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(Path(home, "tokenizer.json")))
    Path(home, "config.json").write_text(json.dumps(CONFIG))
    tensors = {f"model.{name}.weight": torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(tensors, str(Path(home, "model.safetensors")))
    with LLM(home, kv_cache_memory_bytes=1 << 20) as llm:
        params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        outputs = llm.generate(["the cat sat", "on the mat"], params)
if any(len(output.outputs[0].token_ids) != 5 for output in outputs):
    raise SystemExit(f"wrong answers: {outputs}")
print("servekit: ok")
