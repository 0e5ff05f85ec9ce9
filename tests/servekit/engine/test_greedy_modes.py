"""Greedy answers are those of Transformers in every way that the engine may compute them."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.tiny import make_folder

from servekit import LLM, SamplingParams

COUNT = 24
SHARED = [50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 200, 210]
PROMPTS = [[11], [12, 13, 14], SHARED, [*SHARED, 5, 6], list(range(300, 350)), [7, 8] * 9, [*SHARED, 5, 6, 9, 9, 9]]
MODES = {
    "plain": {},
    "sync": {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 7},
    "threshold": {"long_prefill_token_threshold": 5},
    "uncached": {"enable_prefix_caching": False},
    "small-blocks": {"block_size": 8},
    "large-blocks": {"block_size": 64},
    "two-rows": {"max_num_seqs": 2},
    "speculative": {"speculative_config": {"num_speculative_tokens": 4, "prompt_lookup_min": 1}},
    "preempted": {"kv_cache_memory_bytes": 13 << 12, "block_size": 8, "max_model_len": 80},
    "fair": {"scheduling_policy": "fair"},
    "all": {
        "kv_cache_memory_bytes": 13 << 12,
        "block_size": 8,
        "max_model_len": 80,
        "max_num_batched_tokens": 9,
        "speculative_config": {"num_speculative_tokens": 3, "prompt_lookup_min": 1},
    },
}


@pytest.fixture(scope="module", params=["llama", "mistral-window"])
def model(request, tmp_path_factory):
    """A folder, and what Transformers says after each prompt: as far as its choice is no tie."""
    folder = make_folder(tmp_path_factory.mktemp("modes") / request.param, request.param)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    wanted = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            made = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=COUNT,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        gaps = [float(two[0] - two[1]) for two in (scores[0].topk(2).values for scores in made.scores)]
        sure = next((i for i, gap in enumerate(gaps) if gap < 1e-3), COUNT)
        wanted.append(made.sequences[0, len(prompt) :].tolist()[:sure])
    assert sum(map(len, wanted)) > 0.8 * COUNT * len(PROMPTS)
    return folder, wanted


@pytest.mark.parametrize("mode", MODES)
def test_greedy_is_transformers_in_every_mode(model, mode):
    folder, wanted = model
    if mode in ("preempted", "all") and "mistral" in str(folder):
        pytest.skip("a window gives blocks back: the pool does not run short")
    settings = {"kv_cache_memory_bytes": 8 << 20} | MODES[mode]
    params = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True)
    with LLM(folder, **settings) as llm:
        for _ in range(2):  # the second time prompts are found in the cache
            for output, tokens in zip(llm.generate(PROMPTS, params), wanted, strict=True):
                assert output.outputs[0].token_ids[: len(tokens)] == tokens
        siblings = llm.generate(PROMPTS[3], SamplingParams(max_tokens=COUNT, temperature=0, n=3, ignore_eos=True))[0]
        assert len(siblings.outputs) == 3
        for answer in siblings.outputs:
            assert answer.token_ids[: len(wanted[3])] == wanted[3]
        stats = llm.stats()
    assert stats.kv_usage == 0
    assert (stats.preemptions > 0) == (mode in ("preempted", "all"))
    assert stats.prefix_hit_tokens > 0 or mode in ("uncached", "large-blocks")
    assert (stats.drafted_tokens > 0) == (mode in ("speculative", "all"))
