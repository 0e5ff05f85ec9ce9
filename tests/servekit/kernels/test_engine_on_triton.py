"""The whole engine on Triton's kernels, interpreted or on a GPU: its greedy tokens are Transformers'."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.folders import write_tokenizer
from tests.kernels.backends import DEVICE
from tests.tiny import make_model

from common_platform.errors import ConfigError
from common_platform.kernels import is_interpreted, runs_triton
from servekit import LLM, SamplingParams

pytestmark = pytest.mark.skipif(runs_triton(DEVICE) is not None, reason="triton does not run here")
PROMPTS = [[5, 9, 200, 7], list(range(3, 40)), [77]]
VOCAB = 300
NUM_TOKENS = 6 if is_interpreted() else 32


def expected(folder, prompts, num_tokens):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen3"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / request.param, request.param)


def write_model(path, kind):
    make_model(kind, vocab_size=VOCAB).save_pretrained(path)
    write_tokenizer(path, VOCAB)
    return path


def run(folder, prompts, params, **settings):
    with LLM(
        folder, kernels="triton", device=str(DEVICE), dtype="float32", max_model_len=128, max_num_seqs=4, **settings
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("chunk", [16, 64], ids=["chunked", "whole"])
def test_greedy_tokens_of_triton_are_those_of_transformers(folder, chunk):
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found = run(folder, PROMPTS, params, max_num_batched_tokens=chunk)
    assert [list(tokens) for tokens in found] == expected(folder, PROMPTS, NUM_TOKENS)


def test_a_seed_draws_the_same_tokens_of_triton_alone_and_among_others(tmp_path):
    """Tokens stay on the device from step to step, and no other row changes them."""
    path = write_model(tmp_path / "model", "llama")
    drawn = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=11, max_tokens=4, ignore_eos=True)
    other = SamplingParams(temperature=0.8, seed=3, max_tokens=2, ignore_eos=True, frequency_penalty=0.5)
    alone = run(path, PROMPTS[:1], [drawn])
    together = run(path, PROMPTS, [drawn, other, drawn])
    assert together[0] == alone[0]
    assert len(together[1]) == 2


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_keys_and_values_of_eight_bits_on_triton_leave_the_likely_tokens(tmp_path, stored):
    """The first tokens after a prompt hardly change, and the cache holds more tokens in the same memory."""
    path = write_model(tmp_path / "model", "llama")
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=5, ignore_eos=True)
    answers = {}
    for name in ("auto", stored):
        with LLM(
            path, kernels="triton", device=str(DEVICE), dtype="float32", max_model_len=64, kv_cache_dtype=name
        ) as llm:
            answers[name] = llm.generate([{"prompt_token_ids": PROMPTS[1]}], params)[0].outputs[0]
    exact, low = (dict(answers[name].logprobs[0].top) for name in ("auto", stored))
    assert answers["auto"].token_ids[0] in low
    shared = set(exact) & set(low)
    assert len(shared) >= 4
    assert max(abs(exact[token] - low[token]) for token in shared) < 0.5


def test_keys_and_values_of_eight_bits_need_kernels_that_read_them_as_triton_has(tmp_path):
    path = write_model(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        LLM(path, kernels="reference", device="cpu", kv_cache_dtype="int8")
