"""``LLM``: the whole engine in this process."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.tiny import make_folder

import servekit
from common_platform.artifact import open_model_folder
from common_platform.errors import ArtifactDigestMismatch, ArtifactError, ConfigError, RequestError
from servekit import LLM, SamplingParams
from servekit.execution.logits_processors import name_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_cache_memory_bytes=4 << 20, max_num_seqs=4, max_num_batched_tokens=64) as made:
        yield made


GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = ["The capital of France is", "one two three", "def f(x):\n    return", "a"]


def test_batched_equals_alone_and_order_is_kept(llm):
    together = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"async_scheduling": False},
        {"enable_prefix_caching": False},
        {"block_size": 64},
        {"scheduling_policy": "fair"},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 3},
        {"kv_cache_memory_bytes": 1 << 16, "max_model_len": 64},
    ],
)
def test_no_setting_changes_the_answer(llm, folder, settings):
    expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
    with LLM(folder, **({"kv_cache_memory_bytes": 4 << 20} | settings)) as other:
        assert [o.outputs[0].token_ids for o in other.generate(PROMPTS, GREEDY)] == expected


def test_prompts_in_all_their_forms(llm):
    ids = llm.tokenizer.encode("one two three")
    forms = ["one two three", ids, {"prompt_token_ids": ids}]
    outputs = [llm.generate(form, GREEDY)[0] for form in forms]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert outputs[0].prompt == "one two three"
    assert outputs[1].prompt_token_ids == ids
    assert len(llm.generate([], GREEDY)) == 0


def test_n_best_of_and_seeds(llm):
    params = SamplingParams(max_tokens=8, n=3, seed=11, logprobs=0, ignore_eos=True)
    first, again = (llm.generate("one two", params)[0] for _ in range(2))
    texts = [o.token_ids for o in first.outputs]
    assert texts == [o.token_ids for o in again.outputs]
    assert len({tuple(t) for t in texts}) == 3
    best = llm.generate("one two", SamplingParams(max_tokens=8, n=1, best_of=3, seed=11, ignore_eos=True))[0].outputs
    means = [sum(e.logprob for e in o.logprobs) / len(o.logprobs) for o in first.outputs]
    assert best[0].token_ids == texts[means.index(max(means))]


def test_stop_strings_cut_and_are_named(llm):
    free = llm.generate("one two", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))[0].outputs[0]
    stop = free.text[5:8]
    at = free.text.index(stop)
    cut = llm.generate("one two", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop=[stop]))[0]
    assert (cut.outputs[0].text, cut.outputs[0].finish_reason) == (free.text[:at], "stop")
    assert cut.outputs[0].stop_reason == stop
    kept = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    assert llm.generate("one two", kept)[0].outputs[0].text == free.text[: at + len(stop)]


def test_prompt_logprobs_equal_transformers(llm, folder):
    prompt = "The capital of France is Paris, and"
    output = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2))[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([output.prompt_token_ids])).logits[0].log_softmax(-1)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) - 1
    for position, entry in enumerate(output.prompt_logprobs):
        assert entry.token_id == output.prompt_token_ids[position + 1]
        assert abs(float(logprobs[position, entry.token_id]) - entry.logprob) < 1e-4
        assert len(entry.top) == 2


def test_max_tokens_zero_scores_the_prompt_only(llm):
    output = llm.generate("one two three", SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert output.outputs[0].token_ids == []
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) - 1


def test_chat_goes_through_the_template(llm):
    chat = [{"role": "user", "content": "hi"}]
    output = llm.chat(chat, GREEDY)[0]
    assert output.prompt == llm.tokenizer.apply_chat_template(chat)
    assert len(llm.chat([chat, chat], GREEDY)) == 2


@pytest.mark.parametrize(
    ("prompt", "params", "code"),
    [
        ("", GREEDY, "empty_prompt"),
        ([], GREEDY, None),
        ({"prompt_token_ids": [49152]}, GREEDY, "out_of_range"),
        ({"prompt_token_ids": [1] * 256}, GREEDY, "context_length_exceeded"),
        ("x " * 200, SamplingParams(max_tokens=100), "context_length_exceeded"),
        ("x" * 100_000, GREEDY, "context_length_exceeded"),
        ("\ud800", GREEDY, "invalid_unicode"),
        ("x", SamplingParams(max_tokens=257), "out_of_range"),
        ("x", SamplingParams(stop_token_ids=[49152]), "out_of_range"),
        ("x", SamplingParams(logit_bias={-1: 1.0}), "out_of_range"),
        ("x", SamplingParams(bad_words=[" "]), "out_of_range"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(llm, prompt, params, code):
    if code is None:
        assert llm.generate(prompt, params) == []
        return
    with pytest.raises(RequestError) as raised:
        llm.generate(["one two three", prompt], params)
    assert raised.value.code == code
    assert len(llm.generate("one two three", GREEDY)[0].outputs[0].token_ids) == 12
    assert llm._core.stats().num_running == 0


def test_bad_words_never_come(llm):
    free = llm.generate("one two", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))[0].outputs[0]
    word = next(w for t in free.token_ids if (w := llm.tokenizer.token_text(t).strip()).isalpha())
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, bad_words=[word])
    texts = [llm.tokenizer.token_text(t).strip() for t in llm.generate("one two", params)[0].outputs[0].token_ids]
    assert word not in texts


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 24),
        ("max_num_seqs", 0),
        ("scheduling_policy", "lottery"),
        ("dtype", "int1"),
        ("kv_cache_memory_bytes", 100),
        ("max_model_len", 100_000),
    ],
)
def test_a_setting_out_of_range_is_named(folder, setting, value):
    with pytest.raises(ConfigError) as raised:
        LLM(folder, **({"max_model_len": 64} | {setting: value}))
    assert raised.value.param == setting


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="folder"):
        LLM(tmp_path / "nowhere")


def test_an_artifact_that_answers_differently_is_refused(folder, tmp_path):
    from common_platform.artifact import ArtifactWriter, Probe

    with open_model_folder(folder) as source, ArtifactWriter(tmp_path / "m") as writer:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            writer.write_bytes(name, source.read_bytes(name))
        tensors = {name: source.tensor(name).clone() for name in source.tensor_names}
        writer.write_tensors("model.safetensors", tensors)
        writer.commit(probes=[Probe([5, 6, 7], [-1.0, -1.0])])
    with pytest.raises(ArtifactDigestMismatch, match=r"probes\[0\]"):
        LLM(tmp_path / "m", kv_cache_memory_bytes=4 << 20)


class OnlyEven:
    """Lets half of the vocabulary through, for requests that do not say that they want it all."""

    def __new__(cls, params):
        return None if (params.extra_args or {}).get("all") else super().__new__(cls)

    def __init__(self, params):
        self.calls = 0

    def __call__(self, prompt_ids, output_ids, logits):
        assert len(output_ids) == self.calls, "one a request, called before each of its tokens"
        self.calls += 1
        logits[1::2] = float("-inf")
        return logits


@pytest.mark.parametrize("named", [OnlyEven, f"{__name__}:OnlyEven"], ids=["class", "name"])
def test_a_class_of_ones_own_sees_every_request(llm, folder, named):
    name_of(OnlyEven)
    with LLM(folder, kv_cache_memory_bytes=4 << 20, logits_processors=[named]) as other:
        for output in other.generate(PROMPTS, GREEDY):
            assert all(token % 2 == 0 for token in output.outputs[0].token_ids)
        free = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, extra_args={"all": True})
        found = [output.outputs[0].token_ids for output in other.generate(PROMPTS, free)]
    assert found == [output.outputs[0].token_ids for output in llm.generate(PROMPTS, free)]
    assert any(token % 2 for tokens in found for token in tokens)


@pytest.mark.parametrize("wrong", ["no_such_module:X", "json:NoSuchClass", "not a name"])
def test_a_class_that_is_not_there_is_named(folder, wrong):
    with pytest.raises(ConfigError, match="logits_processors"):
        LLM(folder, kv_cache_memory_bytes=4 << 20, logits_processors=[wrong])


def test_public_names():
    assert set(servekit.__all__) >= {"LLM", "SamplingParams", "AsyncEngine"}
    with pytest.raises(AttributeError, match="nope"):
        servekit.nope  # noqa: B018
