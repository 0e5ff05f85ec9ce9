"""What LLM does beside generating: beams, embeddings, scores, sleep, and calls to its workers."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.tiny import make_folder

from common_platform.errors import ConfigError, RequestError, ResourceError
from servekit import LLM, BeamSearchParams, SamplingParams

TEXTS = ["one two three four five six seven", "the quick brown fox jumps over the lazy dog " * 4, "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tasks") / "tiny")


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[16, 2048], ids=["chunked", "whole"])
def llm(folder, request):
    with LLM(folder, kv_cache_memory_bytes=4 << 20, max_num_batched_tokens=request.param, block_size=8) as made:
        yield made


def hidden_states(theirs, token_ids):
    with torch.inference_mode():
        return theirs.model(torch.tensor([token_ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["all", "mean", "last"])
def test_encode_returns_the_hidden_states_of_transformers(llm, theirs, pooling):
    for _ in range(2):  # the second time the prompts are cached
        outputs = llm.encode(TEXTS, pooling=pooling)
        for output in outputs:
            states = hidden_states(theirs, output.prompt_token_ids)
            wanted = {"all": states, "mean": states.mean(dim=0), "last": states[-1]}[pooling]
            torch.testing.assert_close(torch.tensor(output.embedding), wanted, atol=2e-4, rtol=2e-4)


def test_embeddings_have_length_one_and_score_is_their_cosine(llm, theirs):
    vectors = [torch.tensor(output.embedding) for output in llm.embed(TEXTS)]
    assert all(abs(float(vector.norm()) - 1) < 1e-5 for vector in vectors)
    assert llm.score(TEXTS[0], TEXTS) == pytest.approx([float(vectors[0] @ v) for v in vectors], abs=1e-5)
    assert llm.score(TEXTS, TEXTS) == pytest.approx([1.0] * 3, abs=1e-5)
    raw = llm.embed(TEXTS[0], normalize=False)[0]
    assert abs(sum(x * x for x in raw.embedding) - 1) > 1e-3


def test_wrong_tasks_are_refused(llm):
    with pytest.raises(RequestError, match="pooling"):
        llm.encode("x", pooling="max")
    with pytest.raises(RequestError, match="pooling"):
        llm.embed("x", pooling="all")
    with pytest.raises(ValueError, match="2 queries but 3 texts"):
        llm.score(TEXTS[:2], TEXTS)
    for wrong in ({"beam_width": 0}, {"beam_width": 11}, {"max_tokens": 0}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | wrong))
    with pytest.raises(RequestError, match="max_tokens"):
        llm.beam_search("x", BeamSearchParams(beam_width=2, max_tokens=10_000))


@pytest.mark.parametrize(("width", "ends"), [(1, False), (4, False), (4, True), (7, True)])
def test_beams_are_those_of_transformers(llm, theirs, width, ends):
    prompts = [llm.tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    for prompt in prompts:
        params = BeamSearchParams(beam_width=width, max_tokens=8, ignore_eos=not ends, length_penalty=0.5)
        first = llm.beam_search(prompt, params)[0]
        end = first.sequences[0].token_ids[len(prompt) + 4] if ends else None  # a token that beams do come across
        if ends:
            llm.facts.eos_token_ids[:] = [end]
        try:
            ours = llm.beam_search(prompt, params)[0].sequences
        finally:
            llm.facts.eos_token_ids[:] = [2]
        with torch.inference_mode():
            wanted = theirs.generate(
                torch.tensor([prompt]),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=8,
                do_sample=False,
                length_penalty=0.5,
                early_stopping="never",
                eos_token_id=end if ends else -1,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        best = wanted.sequences[0].tolist()[: len(ours[0].token_ids)]
        assert ours[0].token_ids == best
        if width > 1:
            scores = [beam.score(0.5) for beam in ours]
            assert scores == sorted(scores, reverse=True)
            torch.testing.assert_close(torch.tensor(scores[:1]), wanted.sequences_scores[:1], atol=1e-3, rtol=1e-3)


def test_beams_share_blocks(folder):
    """A search over four beams computes little more than the prompt once and a token a beam and round."""
    prompt = list(range(3, 120))
    with LLM(folder, kv_cache_memory_bytes=8 << 20, block_size=16) as llm:
        llm.beam_search(prompt, BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True))
        stats = llm.stats()
    assert stats.computed_tokens <= len(prompt) + 4 * 10 * 3
    assert stats.kv_usage == 0


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("speculative", [None, {"num_speculative_tokens": 2}])
def test_sleep_gives_memory_back_and_waking_answers_the_same(folder, level, speculative):
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(folder, kv_cache_memory_bytes=4 << 20, speculative_config=speculative) as llm:
        before = llm.generate(TEXTS, params)
        llm.sleep(level)
        assert llm.is_sleeping
        with pytest.raises(ResourceError, match="wake_up"):
            llm.generate("x", params)
        llm.sleep(level)  # already
        llm.wake_up()
        llm.wake_up()
        after = llm.generate(TEXTS, params)
        with pytest.raises(ConfigError, match="level"):
            llm.sleep(3)
    assert [o.outputs[0].token_ids for o in before] == [o.outputs[0].token_ids for o in after]


def test_workers_can_be_called(llm):
    assert llm.collective_rpc(lambda runner, factor: runner.model.vocab_size * factor, 2) == [2 * 49152]
    with pytest.raises(AttributeError):
        llm.collective_rpc("no_such_method")
