"""The fused layers give what transformers' own give, in each precision, with an adapter and without."""

from __future__ import annotations

import contextlib

import peft
import pytest
import torch
from tests.tiny import make_model
from tests.trainkit.lm.test_packing import DOCUMENTS, model_of
from tests.trainkit.tiny import trainer

from common_platform.errors import ConfigError
from trainkit.lm import CausalLM, Lora, collate_packed, states
from trainkit.lm.fused import can_fuse
from trainkit.lm.lora import without_adapter
from trainkit.lm.states import causal_lm, recompute_activations, recompute_mlp

KINDS = ["llama", "llama-bias", "qwen3"]  # tests of packing have the others, in float32
BATCH = collate_packed([DOCUMENTS])
MODES = {  # precision -> dtype of the weights, autocast
    "32": (torch.float32, False),
    "bf16-mixed": (torch.float32, True),
    "bf16-true": (torch.bfloat16, False),
}


def module_of(kind: str, dtype: torch.dtype, adapter: Lora | None) -> CausalLM:
    module = CausalLM(make_model(kind).to(dtype), loss_chunk=16, lora=adapter)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def is_fused(module: CausalLM) -> bool:
    return can_fuse(causal_lm(module.model).base_model)


def gradients(module: CausalLM, *, mixed: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else contextlib.nullcontext():
        loss = module.loss(BATCH)[0]
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", [None, Lora(rank=4)], ids=["whole", "adapter"])
def test_gradients_are_as_near_to_the_true_ones_as_those_of_transformers(monkeypatch, kind, mode, adapter):
    """True: in float64. In float32 all differ by rounding; in bfloat16 by no more than twice what the others do."""
    dtype, mixed = MODES[mode]
    found = []
    for fuses, of, low in ((True, dtype, mixed), (False, dtype, mixed), (False, torch.float64, False)):
        monkeypatch.setattr(states, "can_fuse", can_fuse if fuses else lambda _: False)
        module = module_of(kind, of, adapter)
        assert is_fused(module)
        found.append(gradients(module, mixed=low))
    (ours, our_grads), (theirs, their_grads), (true, true_grads) = found
    assert our_grads.keys() == their_grads.keys() == true_grads.keys()
    assert abs(ours - true) <= 2 * abs(theirs - true) + 1e-6 * abs(true) + (0 if mode == "32" else 1e-3 * abs(true))
    for name, grad in true_grads.items():
        scale = grad.norm() + 1e-6
        far, allowed = (our_grads[name] - grad).norm() / scale, (their_grads[name] - grad).norm() / scale
        assert far <= 2 * allowed + (1e-5 if mode == "32" else 2e-3), name


@pytest.mark.parametrize("recompute", [recompute_activations, recompute_mlp])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("adapter", [None, Lora(rank=4)], ids=["whole", "adapter"])
def test_recomputed_activations_give_the_same_gradients(mixed, adapter, recompute):
    found = []
    for recomputes in (False, True):
        module = module_of("qwen3", torch.float32, adapter).train()
        if recomputes:
            recompute(causal_lm(module.model))
        assert is_fused(module)
        found.append(gradients(module, mixed=mixed))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


def test_without_the_activations_of_the_mlp_less_is_kept():
    """Gate and up are [tokens, 96] in each of two layers."""
    kept = []
    for recomputes in (False, True):
        module, sizes = module_of("qwen3", torch.float32, None), []
        if recomputes:
            recompute_mlp(module.model)

        def count(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module.loss(BATCH)
        kept.append(sum(sizes))
    tokens = BATCH["input_ids"].numel()
    assert kept[0] - kept[1] == 2 * 2 * tokens * module.model.config.intermediate_size * 4


def test_only_fused_layers_can_leave_out_those_of_the_mlp():
    with pytest.raises(ConfigError, match="gradient_checkpointing: got mlp"):
        recompute_mlp(model_of("gpt2"))


def test_an_adapter_that_is_off_or_merged_is_the_base_or_a_part_of_it():
    module, plain = module_of("qwen3", torch.float32, Lora(rank=4)), CausalLM(make_model("qwen3"), loss_chunk=16)
    with torch.no_grad():
        adapted = module.loss(BATCH)[0]
        with without_adapter(module.model):
            assert is_fused(module)
            torch.testing.assert_close(module.loss(BATCH)[0], plain.loss(BATCH)[0])
        module.model.merge_adapter()
        assert is_fused(module)
        torch.testing.assert_close(module.loss(BATCH)[0], adapted, rtol=1e-5, atol=1e-3)


def dora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True))


def two_adapters(model):
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
@pytest.mark.parametrize("make", [dora, two_adapters])
def test_other_adapters_take_the_layers_of_their_own(make):
    module = CausalLM(make(make_model("llama")))
    assert not is_fused(module)
    module.loss(BATCH)[0].backward()


def test_dropout_is_left_to_the_layers_that_draw_it():
    module = module_of("llama", torch.float32, Lora(rank=4, dropout=0.1))
    assert not is_fused(module.train())
    assert is_fused(module.eval())


def test_a_trainer_with_mixed_precision_takes_the_fused_layers(tmp_path, monkeypatch):
    calls, fused = [], states.fused_backbone

    def watched(*args, **named):
        calls.append(torch.is_autocast_enabled("cpu"))
        return fused(*args, **named)

    monkeypatch.setattr(states, "fused_backbone", watched)
    module = module_of("qwen3", torch.float32, Lora(rank=4))
    run = trainer(tmp_path, max_steps=2, logger=False, enable_checkpointing=False, precision="bf16-mixed")
    run.fit(module, [BATCH, BATCH])
    assert calls[-2:] == [True, True]
    assert run.callback_metrics["train_loss"].isfinite()
