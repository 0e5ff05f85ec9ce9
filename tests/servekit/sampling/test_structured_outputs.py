"""What a grammar lets through is right, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common_platform.embedded import smollm2
from common_platform.errors import RequestError
from servekit.execution.sampler import NO_TOKEN, Sampler
from servekit.sampling.parameters import SamplingParams, StructuredOutput
from servekit.sampling.structured.limits import GrammarLimits
from servekit.sampling.structured.matcher import GrammarCompiler, GrammarState

VOCABULARY = 49_152
EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'a "quoted"\\ one', "two\nlines", "grün", "日本"]


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler((smollm2() / "tokenizer.json").read_text(encoding="utf-8"), VOCABULARY, [EOS])


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(smollm2() / "tokenizer.json"))


def test_compiled_grammars_are_kept_up_to_so_many_bytes() -> None:
    """grm-021's cache: by what they are taken to need, the least recently used goes first."""
    text, most = (smollm2() / "tokenizer.json").read_text(encoding="utf-8"), 150_000
    small = GrammarCompiler(text, VOCABULARY, [EOS], GrammarLimits(cache_bytes=most))
    for number in range(12):
        spec = StructuredOutput(choice=[f"{number}" * (100 * (number % 4) + 1)])
        assert small.compile(spec).accept(tokens_of(f"{number}")) or number >= 4
        assert 0 < small.num_cached_bytes <= most
        assert small.compile(spec).is_complete is False
    huge = StructuredOutput(choice=["a" * 3000])
    assert small.compile(huge).accept(tokens_of("a" * 3000))
    assert small.num_cached_bytes <= most, "what is larger than all of it is not kept"


def tokens_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def generated(spec: StructuredOutput, seed: int, max_tokens: int = 400, **params: int) -> tuple[list[int], bool]:
    """Tokens sampled from random logits, and whether the end came by itself."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(VOCABULARY, 1)
    asked = SamplingParams(seed=seed, max_tokens=None, **params)
    sampler.add_row(0, asked, [1], [], [EOS], compiler().compile(spec))
    tokens: list[int] = []
    for _ in range(max_tokens):
        logits = torch.randn(1, VOCABULARY, generator=generator) * 3
        output = sampler.sample(logits, [0])
        assert not output.errors
        if output.token_ids == [EOS]:
            return tokens, True
        tokens += output.token_ids
    return tokens, False


def text_of(spec: StructuredOutput, seed: int) -> str:
    tokens, ended = generated(spec, seed)
    assert ended
    return tokenizer().decode(tokens)


@pytest.mark.parametrize("seed", range(8))
def test_a_json_schema_is_kept(seed):
    person = json.loads(text_of(StructuredOutput(json=json.dumps(PERSON)), seed))
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 8
    assert type(person["age"]) is int and 0 <= person["age"] <= 130
    assert len(person["tags"]) <= 3 and set(person["tags"]) <= {"a", "b", "c"}


@pytest.mark.parametrize("pattern", [r"[a-c]{3}-[0-9]{2}", r"(GET|PUT) /[a-z]{1,12}", r"(ab|cd){2,5}x?"])
def test_a_regular_expression_is_kept(pattern):
    for seed in range(4):
        assert re.fullmatch(pattern, text_of(StructuredOutput(regex=pattern), seed))


def test_a_choice_is_one_of_the_choices_and_each_can_be_made():
    spec = StructuredOutput(choice=CHOICES)
    assert {text_of(spec, seed) for seed in range(4)} <= set(CHOICES)
    for text in CHOICES:
        state = compiler().compile(spec)
        assert state.accept([*tokens_of(text), EOS]), text


def test_grammars_in_lark_and_in_ebnf_are_kept():
    lark = StructuredOutput(grammar='start: "<" WORD ("," WORD)? ">"\nWORD: /[a-z]{1,6}/')
    ebnf = StructuredOutput(grammar='root ::= ("a" | "b") digit digit\ndigit ::= [0-9]')
    for seed in range(4):
        assert re.fullmatch(r"<[a-z]{1,6}(,[a-z]{1,6})?>", text_of(lark, seed))
        assert re.fullmatch(r"[ab][0-9]{2}", text_of(ebnf, seed))


def test_hundreds_of_tokens_stay_inside_the_grammar():
    """An endless constraint: what has come so far can always still be completed."""
    spec = StructuredOutput(json='{"type": "array", "items": {"type": "integer"}, "minItems": 300}')
    tokens, ended = generated(spec, 0, max_tokens=400)
    assert not ended and len(tokens) == 400
    assert re.fullmatch(r"\[(-?\d+, )*-?\d*,? ?", tokenizer().decode(tokens))


def test_any_json_object():
    spec = StructuredOutput(json_object=True)
    assert compiler().compile(spec).accept([*tokens_of('{"a": [1, {"b": null}], "c": "d"}'), EOS])
    assert not compiler().compile(spec).accept(tokens_of("[1]"))


def test_the_end_is_allowed_exactly_where_the_grammar_is_complete():
    state = compiler().compile(StructuredOutput(regex="ab?"))
    assert not state.is_complete and not state.accept([EOS])
    assert state.accept(tokens_of("a"))
    assert state.is_complete and not state.is_finished
    assert state.accept([EOS]) and state.is_finished
    assert allowed(state) == {EOS}
    assert not state.accept(tokens_of("b"))
    state.rollback(1)
    assert state.accept(tokens_of("b")) and state.is_finished
    assert allowed(state) == {EOS}


def test_tokens_outside_the_vocabulary_are_refused_and_do_no_harm():
    state = compiler().compile(StructuredOutput(regex="a+"))
    for token in (-1, VOCABULARY, 10**9):
        assert not state.accept([token])
    assert state.accept(tokens_of("aa"))


def test_what_must_come_is_forced():
    state = compiler().compile(StructuredOutput(json=json.dumps(PERSON)))
    forced = state.forced()
    assert forced and '{"name": "'.startswith(tokenizer().decode(forced))
    assert state.accept(forced)


def allowed(state: GrammarState) -> set[int]:
    row = np.zeros(compiler().num_mask_words, np.int32)
    state.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 4), st.integers(-3, -1)), max_size=12), st.integers(0, 1000))
def test_rollback_and_copies_stand_where_a_fresh_state_would(moves, seed):
    """Whatever is accepted and undone, a state equals one that accepted only what is left; ends are undone as well."""
    spec = StructuredOutput(regex="(ab|c)*")
    rng = np.random.default_rng(seed)
    state, history = compiler().compile(spec), []
    for move in moves:
        for _ in range(move):
            token = int(rng.choice(sorted(allowed(state))))
            assert state.copy().accept([token]) and state.accept([token])
            history.append(token)
        if move < 0:
            undone = min(-move, len(history))
            state.rollback(undone)
            del history[len(history) - undone :]
        fresh = compiler().compile(spec)
        assert fresh.accept(history)
        assert allowed(fresh) == allowed(state)
        assert (fresh.is_complete, fresh.is_finished) == (state.is_complete, state.is_finished)


def test_a_prefix_of_drafts_is_measured_without_a_move():
    state = compiler().compile(StructuredOutput(regex="abc"))
    drafts = [*tokens_of("a"), *tokens_of("b"), *tokens_of("x")]
    before = allowed(state)
    assert state.allowed_prefix(drafts) == 2
    assert state.allowed_prefix([EOS]) == 0
    assert allowed(state) == before


def test_a_request_with_a_grammar_goes_on_after_a_preemption():
    """A row that comes back with its output and a fresh state follows the grammar from where it was."""
    spec = StructuredOutput(json=json.dumps(PERSON))
    tokens, _ = generated(spec, 3)
    sampler = Sampler(VOCABULARY, 2)
    sampler.add_row(1, SamplingParams(temperature=0), [1], tokens[:5], [EOS], compiler().compile(spec))
    logits = torch.zeros(1, VOCABULARY)
    logits[0, tokens[5]] = 5.0
    assert sampler.sample(logits, [1]).token_ids == [tokens[5]]


def test_min_tokens_cannot_leave_a_finished_grammar_without_a_token():
    tokens, ended = generated(StructuredOutput(choice=["yes"]), 0, min_tokens=20, max_tokens=20)
    assert ended and tokenizer().decode(tokens) == "yes"


def test_a_grammar_that_fails_ends_its_own_row_only():
    sampler = Sampler(VOCABULARY, 3)
    state = compiler().compile(StructuredOutput(regex="a+"))
    sampler.add_row(0, SamplingParams(seed=1), [1], [], [EOS], state)
    impossible = [tokens_of("z")[0]]
    sampler.add_row(1, SamplingParams(seed=1), [1], impossible, [EOS], compiler().compile(StructuredOutput(regex="a+")))
    sampler.add_row(2, SamplingParams(seed=1, allowed_token_ids=impossible), [1], [], [EOS], state.copy())
    output = sampler.sample(torch.zeros(3, VOCABULARY), [0, 1, 2])
    assert output.token_ids[0] != NO_TOKEN
    assert output.token_ids[1:] == [NO_TOKEN, NO_TOKEN]
    assert "generated before" in output.errors[1]
    assert "leave none" in output.errors[2]


def test_a_mask_of_the_wrong_shape_is_refused():
    with pytest.raises(RequestError, match="contiguous int32"):
        compiler().compile(StructuredOutput(regex="a")).fill_mask(np.zeros(3, np.int32))
