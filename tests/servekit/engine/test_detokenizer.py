"""Deltas joined are the text of all tokens, and stop strings are found wherever they are cut."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common_platform.embedded import smollm2
from servekit.engine.detokenizer import ByteDetokenizer, StopStrings, WindowDetokenizer, detokenizer_for
from servekit.engine.tokenizer import REPLACEMENT, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(smollm2())


def by_bytes(tokenizer, *, skip_special_tokens=True):
    found = detokenizer_for(tokenizer, skip_special_tokens=skip_special_tokens)
    assert isinstance(found, ByteDetokenizer)
    return found


both = pytest.mark.parametrize("make", [WindowDetokenizer, by_bytes])

texts = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("éß漢字🌟🇩🇪 \n")), max_size=40)


@both
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_deltas_join_to_the_whole_text(tokenizer, make, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = make(tokenizer)
    deltas = [detokenizer.add(token) for token in ids]
    whole = tokenizer.decode(ids)
    assert REPLACEMENT in whole or not any(REPLACEMENT in delta for delta in deltas)
    assert "".join(deltas) + detokenizer.finish() == whole


@both
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 49151), st.integers(0, 300)), max_size=30), skip=st.booleans())
def test_any_tokens_at_all(tokenizer, make, ids, skip):
    detokenizer = make(tokenizer, skip_special_tokens=skip)
    joined = "".join(detokenizer.add(token) for token in ids) + detokenizer.finish()
    assert joined == tokenizer.decode(ids, skip_special_tokens=skip)


pieces = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=400, deadline=None)
@given(pieces=pieces, stop=stops, include=st.booleans())
def test_stop_strings_are_found_however_the_text_is_cut(pieces, stop, include):
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), -len(s), s) for s in stop if s in whole]
    checker = StopStrings(stop, include=include)
    shown = ""
    for piece in pieces:
        shown += checker.add(piece)
        if checker.found is None:
            assert not any(s in shown for s in stop)
    shown += checker.finish()
    if not ends:
        assert (shown, checker.found) == (whole, None)
        return
    first_end = min(ends)[0]
    assert checker.found is not None
    assert whole[:first_end].endswith(checker.found) or not include
    expected = whole[: first_end if include else first_end - len(checker.found)]
    # a piece may hold several; the earliest end wins within what has been seen by then
    assert whole.startswith(shown)
    assert shown == expected


@both
def test_half_characters(tokenizer, make):
    star = tokenizer.encode("🌟", add_special_tokens=False)
    assert len(star) > 1
    detokenizer = make(tokenizer)
    assert [detokenizer.add(token) for token in star[:-1]] == [""] * (len(star) - 1)
    assert detokenizer.add(star[-1]) == "🌟"
    half = make(tokenizer)
    half.add(star[0])
    assert REPLACEMENT in half.finish()
    assert bytes(b for token in star for b in tokenizer.token_bytes(token)) == "🌟".encode()


def test_a_tokenizer_that_does_more_than_join_bytes_is_asked_itself(tokenizer, tmp_path):
    about = json.loads((smollm2() / "tokenizer.json").read_text())
    about["decoder"] = {"type": "Sequence", "decoders": [about["decoder"], {"type": "Fuse"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text((smollm2() / "config.json").read_text())
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert isinstance(detokenizer_for(Tokenizer.from_folder(tmp_path)), WindowDetokenizer)


def test_ids_behind_the_vocabulary_add_nothing(tokenizer):
    assert by_bytes(tokenizer).add(10**6) == ""
