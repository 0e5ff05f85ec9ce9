"""Speculative decoding changes the number of steps and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import make_folder

from common_platform.errors import ConfigError
from servekit import LLM, SamplingParams
from servekit.execution.proposer import NgramProposer
from servekit.execution.speculative import SpeculativeConfig
from servekit.sampling.parameters import StructuredOutput


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=40), longest=st.integers(1, 4), count=st.integers(1, 6))
def test_a_proposal_is_what_followed_the_same_tokens_before(tokens, longest, count):
    config = SpeculativeConfig(num_speculative_tokens=count, prompt_lookup_max=longest, prompt_lookup_min=1)
    found = NgramProposer(config).following(np.array(tokens, dtype=np.int64))
    assert len(found) <= count
    for length in range(longest, 0, -1):
        ends = [i for i in range(length, len(tokens)) if tokens[i - length : i] == tokens[-length:]]
        if ends:
            whole = [end for end in ends if end + count <= len(tokens)]
            first = whole[-1] if whole else ends[0]
            assert found == tokens[first : first + count]
            assert found
            return
    assert found == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("speculative") / "tiny")


PROMPTS = ["a b c d a b c d a b", "one two one two one", "nothing repeats here", "x"] * 2
CASES = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.7, "seed": 5},
    "penalties": {"temperature": 0.5, "seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    "stop": {"temperature": 0, "stop_token_ids": [101], "min_tokens": 5},
    "n": {"temperature": 1.0, "seed": 3, "n": 3},
    "grammar": {"temperature": 1.0, "seed": 3, "structured_outputs": StructuredOutput(regex="(ab|cd){5}")},
}


@pytest.fixture(scope="module")
def drafters(folder, tmp_path_factory):
    """Prompt lookup, the model itself, and another model of its vocabulary."""
    other = make_folder(tmp_path_factory.mktemp("draft") / "other", seed=7, num_hidden_layers=1)
    return {
        "ngram": {"num_speculative_tokens": 3, "prompt_lookup_min": 1},
        "itself": {"model": str(folder), "num_speculative_tokens": 4},
        "other": {"model": str(other), "num_speculative_tokens": 18},
    }


@pytest.mark.parametrize("drafter", ["ngram", "itself", "other"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_same_token_for_token(folder, drafters, drafter, case):
    few = None if case == "grammar" else [100, 101, 102]  # so that the model repeats itself
    params = SamplingParams(max_tokens=30, ignore_eos=case != "grammar", allowed_token_ids=few, **CASES[case])
    outputs = []
    for speculative in (None, drafters[drafter]):
        with LLM(
            folder, kv_cache_memory_bytes=1 << 17, max_model_len=128, max_num_seqs=5, speculative_config=speculative
        ) as llm:
            outputs.append(llm.generate(PROMPTS, params))
            stats = llm._core.stats()
    for one, other in zip(*outputs, strict=True):
        assert [a.token_ids for a in one.outputs] == [a.token_ids for a in other.outputs]
        assert [a.text for a in one.outputs] == [a.text for a in other.outputs]
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert len(a.logprobs or []) == len(b.logprobs or [])
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert x.token_id == y.token_id
                assert abs(x.logprob - y.logprob) < 1e-4
    assert stats.drafted_tokens > 0
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens


def test_repetition_is_accepted_and_saves_steps(folder):
    """A bias makes the model say one token for ever: nearly every draft is right."""
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, logit_bias={100: 100.0})
    with LLM(folder, kv_cache_memory_bytes=4 << 20, speculative_config={"num_speculative_tokens": 4}) as llm:
        output = llm.generate("x", params)[0].outputs[0]
        stats = llm._core.stats()
    assert output.token_ids == [100] * 60
    assert stats.accepted_tokens > 40
    assert stats.steps < 25


def test_a_draft_model_that_is_the_target_is_always_right(folder, drafters):
    """Also behind a prefix found in the cache, which was computed for both models."""
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM(folder, kv_cache_memory_bytes=4 << 20, speculative_config=drafters["itself"]) as llm:
        first = llm.generate("one two three four five six seven eight nine ten eleven", params)[0]
        before = llm._core.stats()
        second = llm.generate("one two three four five six seven eight nine ten eleven", params)[0]
        after = llm._core.stats()
    assert before.accepted_tokens == before.drafted_tokens == 31  # 8 rounds of 5 tokens, less what was not needed
    assert after.steps == 2 * before.steps == 2 * 9
    assert second.num_cached_tokens > 0
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_grammar_jumps_ahead_where_it_leaves_no_choice(folder):
    """One step for the forced text, not one a token; neighbours and the answer are what they would have been."""
    forced = "the quick brown fox jumps over the lazy dog"
    params = [
        SamplingParams(max_tokens=60, temperature=1.0, seed=1, structured_outputs=StructuredOutput(regex=forced)),
        SamplingParams(max_tokens=6, temperature=1.0, seed=1),
    ]
    with LLM(folder, kv_cache_memory_bytes=4 << 20) as llm:
        outputs = llm.generate(["x", "y"], params)
        stats = llm._core.stats()
        alone = llm.generate("y", params[1])[0]
    assert outputs[0].outputs[0].text == forced
    assert outputs[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert stats.accepted_tokens > 0
    assert stats.steps < len(outputs[0].outputs[0].token_ids)


def test_a_draft_model_must_fit_the_target(folder, tmp_path):
    short = make_folder(tmp_path / "short", max_position_embeddings=64)
    sliding = make_folder(tmp_path / "sliding", "mistral-window")
    for wrong, words in ((short, "positions"), (sliding, "full attention")):
        with pytest.raises(ConfigError, match=words):
            LLM(folder, kv_cache_memory_bytes=4 << 20, speculative_config={"model": str(wrong)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "oracle"},
        {"num_speculative_tokens": 0},
        {"prompt_lookup_min": 5},
        {"prompt_lookup_max": 99},
        {"method": "draft_model"},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match="speculative_config"):
        SpeculativeConfig(**wrong)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"tokens": 3}', '{"num_speculative_tokens": 99}', '{"method": 3}'])
def test_wrong_json_is_named(text):
    with pytest.raises(ConfigError, match="speculative_config"):
        SpeculativeConfig.parse(text)


def test_json_is_read():
    config = SpeculativeConfig.parse('{"method": "ngram", "num_speculative_tokens": 7}')
    assert (config.method, config.num_speculative_tokens) == ("ngram", 7)
