"""Adapters: they alone are trained, they come back from their file, and merged they are the same model."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import make_folder, make_model
from tests.trainkit.tiny import trainer
from torch.utils.data import DataLoader

from common_platform.artifact import open_model_folder
from common_platform.errors import ConfigError, ResourceError
from trainkit.export import handoff
from trainkit.lm import CausalLM, ChatDataset, Lora, PackedDataset, collate_packed, load_adapter, merged, save_adapter
from trainkit.lm import lora as lora_module

BATCH = collate_packed([[{"input_ids": list(range(3, 30)), "labels": list(range(3, 30))},
                         {"input_ids": list(range(60, 75)), "labels": list(range(60, 75))}]])  # fmt: skip


def trained(kind: str = "llama", **settings) -> CausalLM:
    module = CausalLM(make_model(kind), lora=Lora(rank=4), **settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained():
    plain, adapted = CausalLM(make_model("llama")).eval(), CausalLM(make_model("llama"), lora=Lora(rank=4)).eval()
    losses = [module.loss(BATCH)[0] for module in (plain, adapted)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-4)
    losses[1].backward()
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
    configured = adapted.configure_optimizers()["optimizer"]
    assert sum(p.numel() for g in configured.param_groups for p in g["params"]) == sum(
        p.numel() for name, p in adapted.named_parameters() if "lora_" in name
    )


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
def test_merged_it_is_the_same_model_and_the_module_stays_as_it_is(kind):
    module = trained(kind)
    before = {name: p.clone() for name, p in module.named_parameters()}
    whole = CausalLM(merged(module)).eval()
    assert not any("lora_" in name for name, _ in whole.named_parameters())
    torch.testing.assert_close(module.loss(BATCH)[0], whole.loss(BATCH)[0], rtol=1e-4, atol=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_adapter_comes_back_from_its_own_small_file(tmp_path):
    module = trained()
    folder = save_adapter(module, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    back = CausalLM(load_adapter(make_model("llama"), folder)).eval()
    assert torch.equal(back.loss(BATCH)[0], module.loss(BATCH)[0])
    assert not any(p.requires_grad for p in back.parameters())
    more = CausalLM(load_adapter(make_model("llama"), folder, is_trainable=True))
    assert any(p.requires_grad for p in more.parameters())


def test_a_run_with_an_adapter_ends_as_an_artifact_with_merged_weights(tmp_path):
    base = make_folder(tmp_path / "base", "llama-tied")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ("ab", "cd", "ef")]
    data = PackedDataset(ChatDataset(chats, base, 64), 64)
    module = CausalLM.from_folder(base, lora=Lora(rank=4), lr=1e-2, gradient_checkpointing=True)
    fit = trainer(tmp_path, max_steps=8, logger=False, enable_checkpointing=False)
    loader = DataLoader(data, 1, collate_fn=data.collate)
    before = module.loss(data.collate([data[0]]))[0].item()
    fit.fit(module, loader)
    module.eval()
    after = module.loss(data.collate([data[0]]))[0].item()
    assert after < 0.7 * before
    folder = handoff(module, base, tmp_path / "tuned", dtype="float32")
    with open_model_folder(folder):
        pass
    served = CausalLM.from_folder(folder).eval()
    assert served.loss(data.collate([data[0]]))[0].item() == pytest.approx(after, rel=1e-4)


def test_checkpoints_hold_the_adapter_and_resume_it(tmp_path):
    module = trained()
    fit = trainer(tmp_path, max_steps=1, logger=False)
    loader = [BATCH]
    fit.fit(module, loader)
    path = tmp_path / "kept"
    fit.save_checkpoint(path)
    other = CausalLM(make_model("llama"), lora=Lora(rank=4))
    trainer(tmp_path, max_steps=1, logger=False, enable_checkpointing=False).fit(other, loader, ckpt_path=path)
    assert torch.equal(other.eval().loss(BATCH)[0], module.eval().loss(BATCH)[0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Lora(rank=0), "lora.rank"),
        (lambda: Lora(alpha=math.nan), "lora.alpha"),
        (lambda: Lora(dropout=1.0), "lora.dropout"),
        (lambda: CausalLM(make_model("llama"), lora=Lora(target_modules=["nothing"])), "lora.target_modules"),
        (lambda: merged(CausalLM(make_model("llama"))), "lora=Lora"),
        (lambda: load_adapter(make_model("llama"), "/nowhere"), "adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ResourceError, match=r"peft is not installed.*trainkit\[lm\]"):
        lora_module.add_adapter(make_model("llama"), Lora())
