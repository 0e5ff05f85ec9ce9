"""DPO: the paper's formula, by hand and on a model, with any of the three references."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import make_model
from tests.trainkit.tiny import trainer
from torch.utils.data import DataLoader

from common_platform.embedded import smollm2
from common_platform.errors import ConfigError
from trainkit.lm import DPO, Lora, Preference, PreferenceDataset, dpo_loss
from trainkit.lm.data import IGNORED
from trainkit.lm.dpo import answer_logprobs

USER = [{"role": "user", "content": "a"}]
TALK = [*USER, {"role": "assistant", "content": "b c"}, {"role": "user", "content": "d"}]
PREFERENCES = [
    Preference(USER, "yes, of course", "no"),
    Preference(TALK, "one two", "three four five six"),
    Preference(USER, "good", "bad bad"),
]


@pytest.fixture(scope="module")
def data():
    return PreferenceDataset(PREFERENCES, smollm2(), max_length=128)


def module(**settings) -> DPO:
    return DPO(make_model("llama-tied", vocab_size=49152), **settings).eval()


def batch_of(data, *indices):
    return data.collate([data[i] for i in indices or range(len(data))])


def test_the_loss_by_hand():
    policy = torch.tensor([[-1.0, -5.0], [-2.0, -5.0]])
    reference = torch.tensor([[-1.5, -5.0], [-1.5, -5.0]])
    losses, rewards = dpo_loss(policy, reference, beta=0.5)
    assert rewards.tolist() == [[0.25, 0.0], [-0.25, 0.0]]
    assert losses.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-0.5))), math.log(2)], rel=1e-6)
    smoothed, _ = dpo_loss(policy, reference, beta=0.5, label_smoothing=0.1)
    wanted = -0.9 * math.log(1 / (1 + math.exp(-0.5))) - 0.1 * math.log(1 / (1 + math.exp(0.5)))
    assert smoothed[0].item() == pytest.approx(wanted, rel=1e-6)


def test_an_answers_logprob_is_the_models_own(data):
    own, plain = module(copies_reference=False), make_model("llama-tied", vocab_size=49152)
    wanted = []
    for name in ("chosen", "rejected"):
        for pair in data:
            ids, labels = torch.tensor([pair[name]["input_ids"]]), torch.tensor(pair[name]["labels"])[1:]
            logprobs = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
            learnt = labels != IGNORED
            wanted.append(logprobs[learnt].gather(1, labels[learnt][:, None]).sum())
    found = answer_logprobs(own, batch_of(data))
    torch.testing.assert_close(found, torch.stack(wanted).view(2, -1), rtol=1e-5, atol=1e-3)


def test_only_the_last_answer_counts(data):
    tokenizer = data.tokenizer
    for pair, preference in zip(data, PREFERENCES, strict=True):
        for name in ("chosen", "rejected"):
            learnt = [t for t, label in zip(pair[name]["input_ids"], pair[name]["labels"], strict=True) if label >= 0]
            assert tokenizer.decode(learnt) == f"{getattr(preference, name)}<|im_end|>\n"


def test_the_three_references_are_one(data):
    first = module()
    batch = batch_of(data)
    copied = first.reference_logprobs(batch)
    adapted = module(lora=Lora(rank=2))
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # an adapter that has learnt something
    assert not torch.allclose(answer_logprobs(adapted, batch), copied, atol=0.1)
    torch.testing.assert_close(adapted.reference_logprobs(batch), copied)
    written = PreferenceDataset(PREFERENCES, smollm2(), max_length=128)
    written.add_reference(first, batch_size=2)
    torch.testing.assert_close(module(copies_reference=False).reference_logprobs(batch_of(written)), copied)
    with pytest.raises(ConfigError, match="add_reference"):
        module(copies_reference=False).reference_logprobs(batch)


def test_the_gradient_is_that_of_the_plain_formula(data):
    own = module(beta=0.3)
    for parameter in own.model.parameters():
        parameter.data.add_(0.01)  # no longer the reference
    batch = batch_of(data)
    losses, _ = own.preference_loss(batch)
    policy, reference = answer_logprobs(own, batch), own.reference_logprobs(batch)
    plain = -torch.log(torch.sigmoid(0.3 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))))
    torch.testing.assert_close(losses, plain)
    weights = [p for p in own.parameters() if p.requires_grad]
    for one, other in zip(*(torch.autograd.grad(x.mean(), weights) for x in (losses, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_training_prefers_what_was_chosen_and_leaves_the_reference_alone(data, tmp_path):
    own = DPO(make_model("llama-tied", vocab_size=49152), lr=1e-3, beta=0.5, total_steps=30)
    batch = batch_of(data)
    before = own.reference_logprobs(batch)
    loader = DataLoader(data, 3, collate_fn=data.collate)
    fit = trainer(tmp_path, max_steps=12, logger=False, enable_checkpointing=False)
    fit.fit(own, loader, loader)
    assert torch.equal(own.reference_logprobs(batch), before)
    assert fit.callback_metrics["val_accuracy"] == 1
    assert fit.callback_metrics["val_loss"] < math.log(2) / 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: module(beta=0), "beta"),
        (lambda: module(beta=math.inf), "beta"),
        (lambda: module(label_smoothing=0.5), "label_smoothing"),
        (lambda: PreferenceDataset([Preference(USER, "x", "x")], smollm2()), r"preferences\[0\].*two equal"),
        (lambda: PreferenceDataset(PREFERENCES, smollm2(), max_length=5), "preferences"),
    ],
)
def test_what_cannot_be_learnt_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
