"""SmolLM2-135M, the real thing: servekit's greedy answers are Transformers' answers."""

from __future__ import annotations

import pytest
import torch
import transformers

from common_platform.embedded import smollm2
from servekit import LLM, SamplingParams
from trainkit.lm import docstring_examples

TOKENS = 64
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, ignore_eos=True)
SHARED = "You are a careful assistant who explains Python's standard library in one or two plain sentences. "


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Fifty prompts of very different lengths, a third of them with a prefix in common."""
    found = []
    for i, example in enumerate(docstring_examples("held_out")[:50]):
        text = example.question if i % 2 else f"{example.question}\n{example.answer[: 7 * i]}"
        found.append(SHARED + text if i % 3 == 0 else text)
    return found


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


def assert_greedy(model, output) -> None:
    """By induction over one forward pass: each token is the most likely after those before it, which is what
    ``generate`` would have chosen; and its logprob is Transformers' within 1e-4."""
    answer = output.outputs[0]
    ids = output.prompt_token_ids + answer.token_ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, len(output.prompt_token_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    assert logits.argmax(-1).tolist() == answer.token_ids
    for row, entry in zip(logprobs, answer.logprobs, strict=True):
        assert abs(float(row[entry.token_id]) - entry.logprob) < 1e-4


@pytest.mark.timeout(900)
def test_fifty_prompts_by_64_tokens_in_mixed_batches_with_chunks_and_prefix_hits(prompts, model):
    with LLM(smollm2(), dtype="float32", max_model_len=512, max_num_seqs=24, max_num_batched_tokens=160) as llm:
        outputs = llm.generate(prompts, PARAMS)
        stats = llm._core.stats()
    assert stats.prefix_hit_tokens > 0
    assert stats.steps > 3 * TOKENS  # more rows than fit, and prompts longer than a step
    for output in outputs:
        assert len(output.outputs[0].token_ids) == TOKENS
        assert_greedy(model, output)


@pytest.mark.timeout(600)
def test_alone_equals_generate(prompts, model):
    with LLM(smollm2(), dtype="float32", max_model_len=512, enable_prefix_caching=False) as llm:
        for prompt in prompts[:4]:
            output = llm.generate(prompt, PARAMS)[0]
            ids = torch.tensor([output.prompt_token_ids])
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
            )
            assert made[0, ids.shape[1] :].tolist() == output.outputs[0].token_ids
