"""Chats as data: what is learnt, and that packing changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import make_model

from common_platform.embedded import smollm2
from common_platform.errors import ConfigError
from trainkit.lm import CausalLM, ChatDataset, PackedDataset, pack
from trainkit.lm.data import IGNORED, encode_chat
from trainkit.lm.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(smollm2())


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


contents = st.text(alphabet="ab <|>_\nim_endstar", min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(contents, min_size=2, max_size=6))
def test_exactly_the_answers_are_learnt_and_the_tokens_are_the_templates(tokenizer, turns):
    example = encode_chat(chat(*turns), tokenizer, 10_000)
    whole = tokenizer.apply_chat_template(chat(*turns), tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == whole
    learnt = [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "".join(f"{text}<|im_end|>\n" for text in turns[1::2])


def test_long_chats_lose_their_end_and_those_without_an_answer_go(tokenizer):
    data = ChatDataset([chat("hi", "hello " * 50), chat("question " * 60, "no room")], tokenizer, max_length=60)
    assert (len(data), data.num_dropped) == (1, 1)
    assert len(data[0]["input_ids"]) == 60
    with pytest.raises(ConfigError, match="answer"):
        ChatDataset([chat("question " * 60, "no room")], tokenizer, max_length=60)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths)
def test_packing_keeps_every_example_once_and_wastes_little(lengths):
    examples = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    groups = pack(examples, 30)
    assert sorted(e["input_ids"][0] for g in groups for e in g) == list(range(len(lengths)))
    assert all(sum(len(e["input_ids"]) for e in g) <= 30 for g in groups)
    assert len(groups) <= 11 / 9 * -(-sum(lengths) // 15) + 1
    assert groups == pack(examples, 30)
    with pytest.raises(ConfigError, match="max_length"):
        pack(examples, max(lengths) - 1)


@pytest.fixture(scope="module")
def module():
    return CausalLM(make_model("llama-tied", vocab_size=49152), loss_chunk=7).eval()


CHATS = [chat("a", "one two three"), chat("b b", "four"), chat("c", "five six", "d", "seven"), chat("e", "f g h i j")]


def test_packed_loss_and_gradients_equal_padded_ones(module, tokenizer):
    data = ChatDataset(CHATS, tokenizer, 256)
    packed = PackedDataset(data, 128)
    batches = [
        data.collate([data[i] for i in range(len(data))]),
        packed.collate([packed[i] for i in range(len(packed))]),
    ]
    assert batches[1]["input_ids"].shape[0] < len(data)
    found = []
    for batch in batches:
        module.zero_grad()
        total, count = module.loss(batch)
        total.backward()
        found.append((total.detach(), count, [p.grad.clone() for p in module.parameters()]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_chunked_loss_and_gradients_equal_the_models_own(module, tokenizer):
    data = ChatDataset(CHATS, tokenizer, 256)
    batch = data.collate([data[i] for i in range(len(data))])
    found = []
    for chunk in (7, 10_000, None):
        module.zero_grad()
        if chunk is None:
            mean = module.model(**batch).loss
        else:
            module.hparams["loss_chunk"] = chunk
            total, count = module.loss(batch)
            mean = total / count
        mean.backward()
        found.append((mean.detach(), [p.grad.clone() for p in module.parameters()]))
    for mean, gradients in found[:2]:
        torch.testing.assert_close(mean, found[2][0], rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients, found[2][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_norms_have_no_weight_decay_and_the_schedule_is_by_step(module):
    configured = module.configure_optimizers()
    decayed, plain = configured["optimizer"].param_groups
    assert plain["weight_decay"] == 0
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(module.parameters()))
    assert configured["lr_scheduler"]["interval"] == "step"
