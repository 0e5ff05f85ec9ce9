from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common_platform.errors import RequestError
from servekit.server.json_body import parse
from servekit.server.limits import ServerLimits

LIMITS = ServerLimits()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(texts, children, max_size=4),
    max_leaves=20,
)


def refusal(body: bytes, limits: ServerLimits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, limits)
    return caught.value


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(texts, values, max_size=5), st.booleans())
def test_what_json_can_say_is_read_as_it_was_said(body, ascii_only):
    assert parse(json.dumps(body, ensure_ascii=ascii_only).encode(), LIMITS) == body


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(data):
    try:
        assert isinstance(parse(data, LIMITS), dict)
    except RequestError as error:
        assert error.status == 400


@pytest.mark.parametrize("quote", ["", '"', "\\"])
@pytest.mark.parametrize("depth", [64, 65])
def test_depth_is_counted_inside_a_field_and_brackets_in_strings_do_not_count(depth, quote):
    text = json.dumps("[" * 500 + quote)
    body = f'{{"text": {text}, "metadata": {"[" * depth}{"]" * depth}}}'.encode()
    if depth == 64:
        assert "metadata" in parse(body, LIMITS)
    else:
        error = refusal(body)
        assert (error.code, error.param) == ("json_too_deep", "metadata")
        assert all(word in error.message for word in ("65", "64", "--max-json-depth"))


def test_the_number_of_nodes_is_bounded():
    limits = ServerLimits(max_json_nodes=100)
    assert parse(json.dumps({"a": ["x"] * 90}).encode(), limits)
    error = refusal(json.dumps({"a": ["x"] * 100}).encode(), limits)
    assert error.code == "json_too_deep"
    assert "--max-json-nodes" in error.message


def test_numbers_of_a_token_list_are_no_nodes():
    limits = ServerLimits(max_json_nodes=10)
    assert len(parse(json.dumps({"a": [1] * 1000}).encode(), limits)["a"]) == 1000


@pytest.mark.parametrize(
    ("body", "code", "param", "words"),
    [
        (b"", "invalid_json", None, "empty body"),
        (b'{"model":', "invalid_json", None, "byte 9"),
        (b'{"a": "\xff"}', "invalid_utf8", None, "byte 7"),
        (b"[]", "invalid_type", None, "got array, want object"),
        (b'{"a": {"b": 1, "b": 2}}', "duplicate_key", "a.b", "twice"),
        (b'{"a": [{"x": "ok \\udfff"}]}', "invalid_unicode", "a[0].x", "position 3"),
        (b'{"a": -Infinity}', "invalid_json", None, "-Infinity is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "invalid_json", None, "too long"),
        (b'{"a": 1} {}', "invalid_json", None, "byte 9"),
        (b"\xef\xbb\xbf{}", "invalid_json", None, "byte 0"),
    ],
)
def test_a_fault_is_named_with_its_place(body, code, param, words):
    error = refusal(body)
    assert (error.code, error.param) == (code, param)
    assert words in error.message


def test_a_pair_of_surrogates_is_a_character():
    assert parse(b'{"a": "\\ud83d\\ude00"}', LIMITS) == {"a": "\N{GRINNING FACE}"}
