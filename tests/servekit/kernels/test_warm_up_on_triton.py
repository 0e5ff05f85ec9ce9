"""After a warm-up nothing is left to compile: by Triton's own rule for the launches of an interpreted engine."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gpu.folders import write_tokenizer
from tests.servekit.execution.recorded_ops import OpsRecorder
from tests.tiny import make_folder, make_model

from common_platform.kernels import is_interpreted
from servekit import LLM, SamplingParams
from servekit.execution.warm_up import steps
from servekit.kernels.tuning import bucket

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="it asks what interpreted launches would compile")
VOCAB = 300
SETTINGS = {
    "mistral-window": {},
    "qwen3, int8": {"quantization": "int8"},
    "llama, int4, int8 keys": {"quantization": "int4", "kv_cache_dtype": "int8"},
}


def requests(seed):
    """Prompts of any length, some with a prefix in common, each with parameters of its own."""
    numbers = random.Random(seed)
    shared = [numbers.randrange(3, VOCAB) for _ in range(32)]
    for _ in range(6):
        tail = [numbers.randrange(3, VOCAB) for _ in range(numbers.choice([1, 2, 5, 17]))]
        prompt = shared[: numbers.choice([0, 0, 16, 32])] + tail
        yield (
            {"prompt_token_ids": prompt},
            SamplingParams(
                max_tokens=numbers.choice([1, 2, 4]),
                temperature=numbers.choice([0.0, 1.0]),
                top_k=numbers.choice([0, 5]),
                top_p=numbers.choice([1.0, 0.9]),
                frequency_penalty=numbers.choice([0.0, 0.0, 0.5]),
                logit_bias=numbers.choice([None, {7: 2.0}]),
                allowed_token_ids=numbers.choice([None, list(range(3, 200))]),
                logprobs=numbers.choice([None, None, 2]),
                seed=1,
            ),
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_serving_launches_nothing_that_the_warm_up_has_not_launched(tmp_path, name):
    from tests.kernels.variants import variants

    make_model(name.split(",")[0], vocab_size=VOCAB).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, VOCAB)
    sizes = {"max_model_len": 56, "max_num_seqs": 5, "max_num_batched_tokens": 70}
    with LLM(tmp_path, kernels="triton", device="cpu", dtype="float32", **sizes, **SETTINGS[name]) as llm:
        with variants() as warmed:
            llm.collective_rpc(lambda runner: runner.warm_up())
        with variants() as served:
            prompts, params = zip(*requests(len(name)), strict=True)
            llm.generate(list(prompts), list(params))
    assert len(warmed) >= 8
    assert served
    assert served <= warmed, [(one.kernel, *one.arguments) for one in served - warmed]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_warm_up_has_steps_of_every_size_within_the_limits(max_tokens, max_model_len):
    found = list(steps(max_tokens, max_model_len))
    contexts = [start + count for starts, counts in found for start, count in zip(starts, counts, strict=True)]
    assert min(contexts) > 0
    assert max(contexts) == max_model_len
    assert max(sum(counts) for _, counts in found) == max_tokens
    assert {bucket(sum(counts)) for _, counts in found} == {bucket(tokens) for tokens in range(1, max_tokens + 1)}


@given(st.integers(1, 20_000), st.integers(1, 40), st.integers(1, 300), st.data())
def test_a_warm_up_cuts_contexts_into_all_the_splits_that_serving_does(max_model_len, kv_heads, rows, data):
    from servekit.kernels.paged_attention.triton_backend import num_splits

    warmed = {num_splits(1, kv_heads, starts[0] + 1) for starts, counts in steps(64, max_model_len) if counts == [1]}
    assert num_splits(rows, kv_heads, data.draw(st.integers(1, max_model_len))) in warmed


def test_the_kernels_of_a_recorded_step_can_be_timed_alone(tmp_path):
    from tests.gpu.engine_times import kernels_of_a_step
    from tests.servekit.execution.test_graphs import make_runner

    runner = make_runner(make_folder(tmp_path / "model", vocab_size=VOCAB), OpsRecorder())
    before = [attention.cache.clone() for attention in runner.model.attentions]
    assert kernels_of_a_step(runner, 3) > 0
    for attention, cache in zip(runner.model.attentions, before, strict=True):
        assert torch.equal(attention.cache[:, 1:], cache[:, 1:])  # only the null block


def test_a_launch_of_another_kind_is_seen():
    from tests.kernels.variants import variants

    from servekit.kernels.rms_norm.triton_backend import rms_norm

    with variants() as found:
        for width in (16, 32, 32, 17):
            rms_norm(torch.ones(3, width), torch.ones(width), 1e-5)
    assert len({one.arguments for one in found}) == 3
