"""What readers of a request are told, however late they come: together always the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common_platform.embedded import smollm2
from servekit.core.request import DecodedTokens, RequestUpdate
from servekit.engine.output import OutputProcessor
from servekit.engine.tokenizer import Tokenizer
from servekit.engine.validate import EngineRequest
from servekit.sampling.parameters import SamplingParams


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(smollm2())


parts_of_characters = st.integers(0, 300)  # single bytes, in SmolLM2's vocabulary
steps = st.lists(
    st.tuples(st.one_of(parts_of_characters, st.integers(0, 49151)), st.sampled_from(["wait", "take", "text"])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, stop=st.sampled_from([[], ["e"]]))
def test_texts_and_outputs_taken_in_turn_join_to_the_answer(tokenizer, steps, stop):
    processor = OutputProcessor(tokenizer)
    params = SamplingParams(max_tokens=len(steps), stop=stop, ignore_eos=True)
    request = EngineRequest(request_id="r", prompt_token_ids=[1], sampling=params)
    tracker = processor.add(request, None)
    text, num_tokens, tokens = "", 0, [token for token, _ in steps]
    for index, (token, how) in enumerate(steps):
        is_last = index + 1 == len(steps)
        ended = RequestUpdate("r#0", [token], finish_reason="length")
        processor.process([ended if is_last else DecodedTokens(["r#0"], [token])])
        if is_last or tracker.finished:
            break
        if how == "text" and (news := tracker.take_text()) is not None:
            text, num_tokens = text + news[0], num_tokens + news[1]
        elif how == "take" and (output := tracker.take()) is not None:
            text, num_tokens = text + output.outputs[0].delta_text, num_tokens + len(output.outputs[0].delta_token_ids)
    assert tracker.take_text() is None  # how it ended is more than text
    output = tracker.take()
    assert output.finished
    (choice,) = output.outputs
    assert text + choice.delta_text == choice.text
    assert num_tokens + len(choice.delta_token_ids) == choice.num_tokens
    assert choice.token_ids == tokens[: choice.num_tokens]
    if not stop:
        assert choice.text == tokenizer.decode(tokens)


def test_more_answers_than_one_are_never_mere_text(tokenizer):
    processor = OutputProcessor(tokenizer)
    request = EngineRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=5, n=2))
    tracker = processor.add(request, None)
    processor.process([DecodedTokens(["r#0", "r#1"], [40, 41])])
    assert tracker.take_text() is None
    assert [choice.index for choice in tracker.take().outputs] == [0, 1]
