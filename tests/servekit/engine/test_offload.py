"""Prefixes that left the cache come back from a second tier, and the answers are the same."""

from __future__ import annotations

import pytest
from tests.tiny import make_folder

from common_platform.errors import ConfigError, ResourceError
from servekit import LLM, SamplingParams

PROMPTS = [list(range(k, k + 100)) for k in (10, 500, 1000, 2000)]
PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("offload") / "tiny")


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("speculative", [None, {"num_speculative_tokens": 2}, "itself"])
def test_answers_are_the_same_and_less_is_computed(folder, tmp_path, disk, speculative):
    if speculative == "itself":
        speculative = {"model": str(folder), "num_speculative_tokens": 2}
    with LLM(folder, kv_cache_memory_bytes=8 << 20) as llm:
        wanted = [llm.generate(prompt, PARAMS)[0].outputs[0].token_ids for prompt in PROMPTS]
    small = (2 if speculative and "model" in speculative else 1) * (130 << 10)
    where = {"kv_offload_folder": str(tmp_path)} if disk else {}
    with LLM(
        folder,
        kv_cache_memory_bytes=small,
        max_model_len=120,
        kv_offload_bytes=4 << 20,
        speculative_config=speculative,
        **where,
    ) as llm:
        assert list(tmp_path.iterdir()) == []  # nothing to leave behind
        for _ in range(3):
            found = [llm.generate(prompt, PARAMS)[0].outputs[0].token_ids for prompt in PROMPTS]
            assert found == wanted
        stats = llm.stats()
    assert stats.offload_hit_tokens >= 2 * 4 * 80
    assert stats.kv_usage == 0


def test_a_tier_that_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ResourceError, match="kv_offload_folder"):
        LLM(folder, kv_cache_memory_bytes=4 << 20, kv_offload_bytes=1 << 20, kv_offload_folder=str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="kv_offload_folder"):
        LLM(folder, kv_cache_memory_bytes=4 << 20, kv_offload_bytes=1 << 55, kv_offload_folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="kv_offload_bytes"):
        LLM(folder, kv_cache_memory_bytes=4 << 20, kv_offload_bytes=1 << 55)
    sliding = make_folder(tmp_path / "sliding", "mistral-window")
    with pytest.raises(ConfigError, match="kv_offload_bytes"):
        LLM(sliding, kv_cache_memory_bytes=4 << 20, kv_offload_bytes=1 << 20)
