"""A document's loss in a pack is its loss alone, in every architecture, and where it cannot be, that is said."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.tiny import SHAPE, make_model

from common_platform.errors import ConfigError
from trainkit.lm import CausalLM, collate_packed
from trainkit.lm.attention import NAME, Documents, attend_by_document
from trainkit.lm.data import IGNORED, pad
from trainkit.lm.fused import can_fuse
from trainkit.lm.states import causal_lm, recompute_activations

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
MORE = {  # configurations beside those of tests.tiny: name -> (class, arguments)
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt-neox": ("GPTNeoXConfig", SHAPE),
    "phi3": ("Phi3Config", SHAPE),
    "gemma2": ("Gemma2Config", SHAPE | {"head_dim": 16, "sliding_window": 24}),
    "gemma3": ("Gemma3TextConfig", SHAPE | {"head_dim": 16, "sliding_window": 24}),
    "olmo2": ("Olmo2Config", SHAPE),
    "starcoder2": ("Starcoder2Config", SHAPE | {"sliding_window": 24}),
    "granite": ("GraniteConfig", SHAPE),
    "qwen3-moe": ("Qwen3MoeConfig", SHAPE | MOE),
    "opt": ("OPTConfig", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "word_embed_proj_dim": 64}),
}  # fmt: skip
TINY = ("llama", "llama-tied", "llama-bias", "llama-head-dim", "llama3-rope", "mistral-window", "qwen2", "qwen3")
FUSED = set(TINY)


def model_of(kind: str):
    if kind in TINY:
        return make_model(kind)
    name, settings = MORE[kind]
    config = getattr(transformers, name)(**settings | {"vocab_size": 300})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def example(length: int, seed: int, *, masked: int = 3) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]}


DOCUMENTS = [example(n, i) for i, n in enumerate((30, 9, 41, 5))]


@pytest.mark.parametrize("kind", [*TINY, *MORE])
def test_a_documents_loss_in_a_pack_is_its_loss_alone(kind):
    module = CausalLM(model_of(kind), loss_chunk=16).eval()
    plain = model_of(kind)  # transformers' own, alone
    assert can_fuse(causal_lm(module.model).base_model) == (kind in FUSED)
    packed, count = module.loss(collate_packed([DOCUMENTS]))
    assert count == sum(len(one["input_ids"]) - 3 for one in DOCUMENTS)
    alone = []
    for one in DOCUMENTS:
        ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
        alone.append(plain(input_ids=ids, labels=labels).loss * (len(one["input_ids"]) - 3))
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=2e-5, atol=1e-3)
    packed.backward()
    torch.stack(alone).sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
def test_a_changed_neighbour_changes_nothing(kind):
    module = CausalLM(model_of(kind)).eval()
    others = [example(30, 99), *DOCUMENTS[1:]]
    with torch.no_grad():
        first = module.learnt_states(collate_packed([DOCUMENTS]))[0][27:]
        second = module.learnt_states(collate_packed([others]))[0][27:]
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padded_batches_lose_their_padding_and_nothing_else(kind):
    module = CausalLM(model_of(kind)).eval()
    right = pad(DOCUMENTS, 0)
    left = {name: torch.stack([row.roll(int((right["attention_mask"][i] == 0).sum())) for i, row in enumerate(part)])
            for name, part in right.items()}  # fmt: skip
    packed, count = module.loss(collate_packed([DOCUMENTS]))
    for batch in (right, left):
        total, found = module.loss(batch)
        assert found == count
        torch.testing.assert_close(total, packed, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_recomputed_activations_give_the_same_gradients(kind):
    found = []
    for recompute in (False, True):
        model = model_of(kind)
        if recompute:
            recompute_activations(model)
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        module = CausalLM(model).train()
        module.loss(collate_packed([DOCUMENTS]))[0].backward()
        found.append([p.grad for p in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_frozen_weights_get_no_gradient_and_the_others_the_same_one():
    found = []
    for frozen in (False, True):
        module = CausalLM(make_model("llama-bias"))
        for name, parameter in module.named_parameters():
            parameter.requires_grad = not (frozen and ("layers.0" in name or "embed" in name))
        module.loss(collate_packed([DOCUMENTS]))[0].backward()
        found.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in found[1].items():
        assert (gradient is None) == ("layers.0" in name or "embed" in name)
        assert gradient is None or torch.equal(gradient, found[0][name])


def test_architectures_that_carry_a_state_are_refused():
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8, intermediate_size=64
    )
    module = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ConfigError, match="packing: got mamba"):
        module.loss(collate_packed([DOCUMENTS]))


def test_other_uses_of_the_model_are_as_they_were():
    module, plain = CausalLM(make_model("qwen3")), make_model("qwen3")
    assert module.model.config._attn_implementation == NAME
    batch = pad(DOCUMENTS, 0)
    about = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    torch.testing.assert_close(
        module.model(**about).logits[:, -4:], plain(**about).logits[:, -4:], rtol=1e-4, atol=1e-4
    )
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(module.model.generate(**about, **how), plain.generate(**about, **how))


def test_attention_by_document_is_attention_under_a_block_diagonal_mask():
    torch.manual_seed(0)
    lengths = (5, 1, 12, 7)
    query = torch.randn(25, 6, 16, dtype=torch.float64)
    key, value = torch.randn(2, 25, 2, 16, dtype=torch.float64)
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    for window in (None, 4):
        allowed = (number[:, None] == number[None]).tril()
        allowed = allowed if window is None else allowed.triu(1 - window)
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(3, 1)) * 0.3
        wanted = torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value.repeat_interleave(3, 1)
        )
        found = attend_by_document(query, key, value, Documents(lengths), scale=0.3, window=window)
        torch.testing.assert_close(found, wanted)


def test_documents_have_tokens():
    with pytest.raises(ConfigError, match="documents"):
        Documents(())
    with pytest.raises(ConfigError, match="documents"):
        Documents((3, 0))
