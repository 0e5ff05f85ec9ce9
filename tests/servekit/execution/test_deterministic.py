"""``deterministic=True``: a request has the same bits whatever else is computed, and however."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import make_folder

from common_platform.errors import ConfigError
from servekit import LLM, SamplingParams
from servekit.kernels import exact_ops
from servekit.kernels.agreeing import agreeing_shapes, next_size
from servekit.kernels.linear.deterministic import SIZES, TiledLinears
from servekit.kernels.paged_attention import deterministic
from servekit.kernels.paged_attention.metadata import build_metadata
from servekit.kernels.rms_norm import deterministic as deterministic_norm
from servekit.kernels.silu_and_mul import deterministic as deterministic_gate

pytestmark = pytest.mark.slow

SHARED = list(range(200, 240))
PROMPTS = [
    [11],
    SHARED,
    [*SHARED, 5, 6],
    [7, 8, 9] * 9,
    list(range(300, 371)),
    [*SHARED, 5, 6, *range(500, 533)],
    [100, 101, 102] * 5,
]
PARAMS = [
    SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=16, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=16, temperature=0.7, top_k=40, seed=3, n=3, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=16, temperature=0.8, min_p=0.02, seed=9, repetition_penalty=1.1, logprobs=0),
    SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=2),
    SamplingParams(max_tokens=16, temperature=0.8, typical_p=0.9, seed=2, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=16, temperature=0.7, seed=5, allowed_token_ids=[100, 101, 102], logprobs=1),  # repeats
]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
TIGHT = {"kv_cache_memory_bytes": 18 << 12, "block_size": 8, "max_model_len": 128}  # 18 blocks
SPECULATIVE = {"speculative_config": {"num_speculative_tokens": 3, "prompt_lookup_min": 1}}
MODES = {
    "together": {},
    "sync": {"async_scheduling": False},
    "chunks-of-5": {"max_num_batched_tokens": 5},
    "chunks-of-16": {"max_num_batched_tokens": 16},
    "chunks-of-64": {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 23},
    "uncached": {"enable_prefix_caching": False},
    "large-blocks": {"block_size": 64},
    "two-rows": {"max_num_seqs": 2},
    "speculative": SPECULATIVE,
    "preempted": TIGHT,
    "all": TIGHT | SPECULATIVE | {"max_num_batched_tokens": 9},
}


def bits(output):
    """All that the model said, to be compared with ==."""
    answers = [(answer.token_ids, answer.logprobs) for answer in output.outputs]
    return output.prompt_logprobs, answers


@pytest.fixture(scope="module", params=["llama", "mistral-window"])
def model(request, tmp_path_factory):
    """A folder, and each request's bits when it is alone in an engine without a prefix cache."""
    folder = make_folder(tmp_path_factory.mktemp("deterministic") / request.param, request.param)
    with LLM(folder, deterministic=True, kv_cache_memory_bytes=8 << 20, enable_prefix_caching=False) as llm:
        alone = [bits(llm.generate(prompt, params)[0]) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    return folder, alone


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_are_those_of_the_request_alone(model, mode):
    folder, alone = model
    with LLM(folder, deterministic=True, **({"kv_cache_memory_bytes": 8 << 20} | MODES[mode])) as llm:
        for _ in range(2):  # the second time prompts are found in the cache
            together = llm.generate(PROMPTS, PARAMS)
            for output, expected in zip(together, alone, strict=True):
                assert bits(output) == expected
        stats = llm.stats()
    if "llama" in str(folder):
        assert (stats.preemptions > 0) == (mode in ("preempted", "all"))
    assert stats.prefix_hit_tokens > 0 or mode in ("uncached", "large-blocks")
    assert (stats.drafted_tokens > 0) == (mode in ("speculative", "all"))


def test_the_fastest_kernels_would_not_pass(model):
    folder, _ = model
    with LLM(folder, kv_cache_memory_bytes=8 << 20, enable_prefix_caching=False) as llm:
        alone = [bits(llm.generate(prompt, params)[0]) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        together = [bits(output) for output in llm.generate(PROMPTS, PARAMS)]
    assert alone != together


@pytest.fixture(scope="module")
def engine(model):
    folder, alone = model
    with LLM(folder, deterministic=True, kv_cache_memory_bytes=8 << 20, max_num_batched_tokens=48) as llm:
        yield llm, alone


@settings(max_examples=12, deadline=None)
@given(
    mine=st.integers(0, len(PROMPTS) - 1),
    others=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12), st.booleans()), min_size=2, max_size=17),
    seed=st.integers(0, 1 << 30),
)
def test_neighbours_of_any_length_change_no_bit(engine, mine, others, seed):
    llm, alone = engine
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 40_000) for _ in range(length)] for length, _, _ in others]
    params = [
        SamplingParams(max_tokens=count, temperature=1.0 if hot else 0.0, ignore_eos=True) for _, count, hot in others
    ]
    at = draw.randrange(len(others) + 1)
    prompts.insert(at, PROMPTS[mine])
    params.insert(at, PARAMS[mine])
    assert bits(llm.generate(prompts, params)[at]) == alone[mine]


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
from servekit import LLM
from tests.servekit.execution.test_deterministic import PARAMS, PROMPTS, bits
with LLM(sys.argv[1], deterministic=True, num_threads=int(sys.argv[2]), max_num_batched_tokens=24,
         kv_cache_memory_bytes=8 << 20) as llm:
    alone = [bits(llm.generate(prompt, params)[0]) for prompt, params in zip(PROMPTS, PARAMS)]
    print(alone == [bits(output) for output in llm.generate(PROMPTS, PARAMS)])
    print(alone)
"""


def in_a_new_process(folder, num_threads: int) -> list[str]:
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(num_threads), root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_new_process_says_the_same(model):
    folder, alone = model
    assert in_a_new_process(folder, torch.get_num_threads()) == ["True", repr(alone)]


def test_two_threads_are_as_steady_as_one(model):
    folder, _ = model
    first, second = in_a_new_process(folder, 2), in_a_new_process(folder, 2)
    assert first[0] == "True"
    assert first == second


def test_other_dtypes_are_refused(model):
    folder, _ = model
    with pytest.raises(ConfigError, match="bfloat16.*float32, which deterministic needs"):
        LLM(folder, dtype="bfloat16", deterministic=True)


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 200), width=st.integers(1, 130), dtype=st.just(torch.float32), count=st.integers(1, 90))
def test_a_row_of_a_product_is_the_same_in_any_batch(out, width, dtype, count):
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((out, width), (out,), (count, width)))
    product = TiledLinears()(weight, bias)
    together = product(x)
    torch.testing.assert_close(
        together.double(), x.double() @ weight.double().t() + bias.double(), rtol=DTYPES[dtype], atol=DTYPES[dtype] * 8
    )
    for row in {0, count // 2, count - 1}:
        assert torch.equal(product(x[row:]), together[row:])
        assert torch.equal(product(x[row : row + 1])[0], together[row])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), width=st.integers(1, 200), dtype=st.sampled_from(list(DTYPES)), row=st.integers(0, 39))
def test_norms_and_gates_see_one_row(count, width, dtype, row):
    torch.manual_seed(0)
    x, weight = torch.randn(count, 2 * width).to(dtype), torch.randn(2 * width).to(dtype)
    one = x[row % count : row % count + 1]
    assert torch.equal(
        deterministic_norm.rms_norm(x, weight, 1e-6)[row % count], deterministic_norm.rms_norm(one, weight, 1e-6)[0]
    )
    assert torch.equal(deterministic_gate.silu_and_mul(x)[row % count], deterministic_gate.silu_and_mul(one)[0])


def test_exp_and_tanh_are_near_float64():
    x = torch.cat((torch.linspace(-86.9, 87.9, 100_001), torch.tensor([0.0, -0.0, -1e30, float("-inf")])))
    torch.testing.assert_close(exact_ops.exp(x).double(), x.double().exp(), rtol=3e-7, atol=1e-37)
    assert exact_ops.exp(x)[-1] == 0
    assert exact_ops.exp(torch.zeros(1)) == 1
    assert torch.isnan(exact_ops.exp(torch.tensor([float("nan")]))).all()
    torch.testing.assert_close(exact_ops.tanh(x).double(), x.double().tanh(), rtol=1e-6, atol=2e-7)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=50), st.integers(1, 70))
def test_sizes_cover_any_count(sizes, count):
    covered = 0
    while covered < count:
        size = next_size(count - covered, sizes)
        assert size in sizes
        covered += size


def test_shapes_that_disagree_are_not_mixed():
    """A product whose bits depend on the shape, and one whose bits depend on the place."""
    values = torch.randn(64, 5)

    def by_shape(ids, shape):
        return values[ids] * (1.5 if shape[0] < 8 else 1.0)

    def by_place(ids, shape):
        return values[ids] + torch.arange(len(ids))[:, None] * (shape[0] == 32)

    shapes = [(size,) for size in SIZES]
    assert agreeing_shapes(by_shape, shapes, values.device) == [(64,), (32,), (16,), (8,)]
    assert agreeing_shapes(by_place, shapes, values.device) == [(64,), (16,), (8,), (4,), (1,)]


@settings(max_examples=30, deadline=None)
@given(
    context=st.integers(2, 150),
    cuts=st.lists(st.integers(1, 149), max_size=6),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1), (8, 1)]),
    block_sizes=st.tuples(st.sampled_from([8, 16, 64]), st.sampled_from([8, 16, 64])),
    window=st.sampled_from([0, 0, 1, 7, 70]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    width=st.sampled_from([16, 24, 37]),
)
def test_attention_of_a_token_is_the_same_in_any_chunk_and_cache(
    context, cuts, heads, block_sizes, window, soft_cap, width
):
    torch.manual_seed(0)
    num_heads, kv_heads = heads
    query, keys, values = (torch.randn(context, h, width) for h in (num_heads, kv_heads, kv_heads))

    def attend(chunks, block_size, *, beside):
        """The row's answers chunk by chunk, with ``beside`` other rows in the step."""
        num_blocks = -(-context // block_size)
        cache = torch.full((2, (beside + 1) * num_blocks + 1, block_size, kv_heads, width), float("nan"))
        cache[:, 0] = 0
        order = torch.randperm(cache.shape[1] - 1) + 1
        tables = order.view(beside + 1, num_blocks).int().numpy()
        places = torch.from_numpy(tables[-1].astype("int64"))[:, None] * block_size + torch.arange(block_size)
        cache[:, tables[:-1].ravel()] = 0.5
        cache.view(2, -1, kv_heads, width)[:, places.flatten()[:context]] = torch.stack((keys, values))
        found = []
        for start, end in chunks:
            starts = np.array([*range(beside), start])
            counts = np.array([min(1 + row * 3, context - row) for row in range(beside)] + [end - start])
            metadata = build_metadata(tables, starts, counts, block_size, window, torch.device("cpu"))
            others = torch.randn(int(counts[:-1].sum()), num_heads, width)
            step = torch.cat((others, query[start:end]))
            out = deterministic.paged_attention(step, cache, metadata, width**-0.5, soft_cap)
            found.append(out[len(others) :])
        return torch.cat(found)

    at = sorted({0, *(cut for cut in cuts if cut < context), context})
    whole = attend([(0, context)], block_sizes[0], beside=0)
    chunked = attend(list(itertools.pairwise(at)), block_sizes[1], beside=min(4, context - 1))
    assert torch.equal(whole, chunked)
