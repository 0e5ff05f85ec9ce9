"""Linear layers of few bits on Triton's kernels: norms and gates hand over eight bits, and answers hardly change."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from tests.kernels.backends import DEVICE, multiplies_float8
from tests.servekit.kernels.test_engine_on_triton import PROMPTS, write_model

from common_platform.artifact import open_model_folder
from common_platform.kernels import runs_triton
from servekit import LLM, SamplingParams
from servekit.layers.few_bits import Rounded
from servekit.layers.kernels import kernels_of, rounded_kernels
from servekit.layers.linear import ColumnParallelLinear
from servekit.layers.norm import RMSNorm
from servekit.layers.parallel import SingleRank
from servekit.layers.weights import Weights

pytestmark = pytest.mark.skipif(runs_triton(DEVICE) is not None, reason="triton does not run here")
KINDS = ["int8", "fp8", "int4"]
linear = "servekit.kernels.quantized_linear.triton_w8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def skip_without_float8(kind):
    if kind == "fp8" and not multiplies_float8():
        pytest.skip("this device does not have float8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norm_and_its_linear_layer_are_the_norm_then_the_product(folder, kind, with_residual):
    skip_without_float8(kind)
    kernels = rounded_kernels(kernels_of("cuda"), kind, "cuda", torch.float8_e4m3fn)
    with open_model_folder(folder) as opened:
        weights = Weights(opened, torch.float32, DEVICE, SingleRank(), kernels)
        names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
        product = ColumnParallelLinear(weights, names, 64, [96, 96], bias=False)
        norm = RMSNorm(weights, "model.layers.0.post_attention_layernorm.weight", 64, 1e-6)
    x, residual = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given = residual if with_residual else None
    plain, total = norm.add(x.clone(), None if given is None else given.clone())
    handed, rounded_total = norm.add_to_linear(x.clone(), None if given is None else given.clone())
    assert isinstance(handed, Rounded) == (kind != "int4")
    assert torch.equal(total, rounded_total)
    if DEVICE.type == "cpu":
        assert torch.equal(product(handed), product(plain))
    else:  # the two kernels are compiled apart, and a number between two steps may go either way
        torch.testing.assert_close(product(handed), product(plain), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_few_bits_gives_about_the_likely_tokens(folder, kind, monkeypatch):
    """And only what attention made is rounded by a kernel of its own: one a layer and step."""
    skip_without_float8(kind)
    module = importlib.import_module(linear)
    quantize, calls = module.quantize, []
    monkeypatch.setattr(module, "quantize", lambda *given: (calls.append(given[0].shape), quantize(*given))[1])
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=5, ignore_eos=True)
    answers = {}
    for name in (None, kind):
        with LLM(
            folder, kernels="triton", device=str(DEVICE), dtype="float32", max_model_len=64, quantization=name
        ) as llm:
            answers[name] = llm.generate([{"prompt_token_ids": PROMPTS[1]}], params)[0].outputs[0]
    exact, low = (dict(answers[name].logprobs[0].top) for name in (None, kind))
    shared = set(exact) & set(low)
    assert len(shared) >= 3
    assert max(abs(exact[token] - low[token]) for token in shared) < 0.5
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert calls == [] if kind == "int4" else len(calls) % num_layers == 0 and {shape[1] for shape in calls} == {64}
