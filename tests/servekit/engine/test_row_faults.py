"""A row whose step goes wrong ends alone, with an error; its neighbours say what they would have said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import make_folder

from servekit import LLM, SamplingParams
from servekit.execution.logits_processors import register

PROMPTS = [[10 + k, 20 + k, 30 + k, 40 + k] for k in range(5)]
POISON = 777  # a token whose embedding is no number


def nan_at(count: int):
    def make(params):
        def process(prompt_ids, output_ids, logits):
            return logits * float("nan") if len(output_ids) == count else logits

        return process

    return make


def raise_at(count: int):
    def make(params):
        def process(prompt_ids, output_ids, logits):
            if len(output_ids) == count:
                raise RuntimeError("a plugin's secret")
            return logits

        return process

    return make


def wrong_shape(params):
    return lambda prompt_ids, output_ids, logits: logits[:7]


def infinite(params):
    return lambda prompt_ids, output_ids, logits: logits + float("inf")


FAULTS = {
    "nan-first": nan_at(0),
    "nan-fifth": nan_at(4),
    "raises-first": raise_at(0),
    "raises-fifth": raise_at(4),
    "shape": wrong_shape,
    "infinite": infinite,
}
for fault_name, factory in FAULTS.items():
    register(f"fault-{fault_name}", factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_folder(tmp_path_factory.mktemp("faults") / "tiny")
    weights = load_file(made / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"async_scheduling": False},
        {"speculative_config": {"num_speculative_tokens": 3, "prompt_lookup_min": 1}},
        {"max_num_batched_tokens": 4},
    ],
    ids=["async", "sync", "speculative", "chunked"],
)
def llm(folder, request):
    with LLM(folder, kv_cache_memory_bytes=1 << 17, max_model_len=64, **request.param) as made:
        yield made


def params(index: int, *processors: str) -> SamplingParams:
    return SamplingParams(
        max_tokens=10,
        temperature=[0.0, 0.8][index % 2],
        seed=index,
        ignore_eos=True,
        logprobs=[None, 2][index % 2],
        logits_processors=list(processors),
        allowed_token_ids=[100, 101, 102, 103],
    )


def assert_the_others_are_unchanged(llm, outputs, faulty: int) -> None:
    alone = llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])
    for i, (output, wanted) in enumerate(zip(outputs, alone, strict=True)):
        if i != faulty:
            assert output.outputs[0].finish_reason == "length"
            assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held, stats.kv_usage) == (0, 0, 0, 0.0)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("faulty", [0, 3])
def test_a_faulty_processor_ends_its_own_request(llm, fault, faulty):
    many = [params(i, *([f"fault-{fault}"] if i == faulty else [])) for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, many)
    broken = outputs[faulty].outputs[0]
    assert broken.finish_reason == "error"
    assert broken.error
    assert "secret" not in broken.error
    assert len(broken.token_ids) == (4 if fault.endswith("fifth") else 0)
    assert_the_others_are_unchanged(llm, outputs, faulty)


@pytest.mark.parametrize("faulty", [0, 4])
def test_a_row_of_no_numbers_ends_alone_and_poisons_no_block(llm, faulty):
    """Twice: the second time its blocks are found in the cache, or given to others."""
    prompts = [[*PROMPTS[i][:2], POISON, *PROMPTS[i][2:]] if i == faulty else PROMPTS[i] for i in range(len(PROMPTS))]
    for _ in range(3):
        outputs = llm.generate(prompts, [params(i) for i in range(len(prompts))])
        assert outputs[faulty].outputs[0].finish_reason == "error"
        assert "not a number" in (outputs[faulty].outputs[0].error or "")
        assert_the_others_are_unchanged(llm, outputs, faulty)
        longer = llm.generate([prompt * 6 for prompt in PROMPTS], [params(i) for i in range(len(PROMPTS))])
        assert all(output.outputs[0].finish_reason == "length" for output in longer)


def test_the_weights_do_hold_what_the_test_says(folder):
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.isnan(weight).any(dim=1).nonzero().flatten().tolist() == [POISON]
