"""The door for constraints: what is wrong, unsafe or too large is refused by name, and nothing can hold it shut."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from common_platform.embedded import smollm2
from common_platform.errors import ConfigError, RequestError, ResourceError
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.guard import Abandoned, GrammarGuard
from servekit.sampling.structured.limits import GrammarLimits, check_limits, regex_states

VOCABULARY = 49_152
EOS = 2
GOOD = StructuredOutput(regex="[a-z]+")
SLOW = StructuredOutput(  # half a second in the parser, which looks at every way to leave rules out
    grammar="start: "
    + " ".join(f"a{i}?" for i in range(1500))
    + "\n"
    + "\n".join(f'a{i}: "x"|"y"' for i in range(1500))
)


@cache
def tokenizer_json() -> str:
    return (smollm2() / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def guard() -> Iterator[GrammarGuard]:
    guard = GrammarGuard(tokenizer_json(), VOCABULARY, [EOS])
    yield guard
    guard.close()


def schema(**keywords: object) -> StructuredOutput:
    return StructuredOutput(json=json.dumps({key.replace("_", "$", 1): value for key, value in keywords.items()}))


def nested(depth: int) -> StructuredOutput:
    inner: dict[str, object] = {"type": "integer"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return StructuredOutput(json=json.dumps(inner))


REFUSED = {
    "not JSON": (StructuredOutput(json="{"), "grammar_invalid", "json"),
    "not a schema": (StructuredOutput(json="[1]"), "grammar_invalid", "json"),
    "unknown type": (schema(type="strin"), "grammar_invalid", "json.type"),
    "negative size": (schema(type="string", minLength=-1), "grammar_invalid", "json.minLength"),
    "huge size": (schema(type="string", maxLength=10**9), "grammar_too_large", "json.maxLength"),
    "crossed sizes": (schema(type="array", minItems=3, maxItems=2), "grammar_unsatisfiable", "json"),
    "empty enum": (schema(enum=[]), "grammar_unsatisfiable", "json.enum"),
    "impossible": (
        schema(type="object", properties={"a": False}, required=["a"]),
        "grammar_unsatisfiable",
        "json",
    ),
    "nothing fits": (StructuredOutput(json="false"), "grammar_unsatisfiable", "json"),
    "unsupported": (schema(type="array", uniqueItems=True), "grammar_invalid", "json"),
    "too deep": (nested(40), "grammar_too_deep", "json"),
    "too long": (schema(description="x" * 70_000), "grammar_too_large", "json"),
    "remote": (schema(_ref="http://169.254.169.254/schema"), "grammar_remote_ref", "json.$ref"),
    "file": (schema(_ref="file:///etc/passwd"), "grammar_remote_ref", "json.$ref"),
    "dangling": (schema(_ref="#/$defs/none"), "grammar_invalid", "json.$ref"),
    "own tail": (
        schema(_ref="#/$defs/a", _defs={"a": {"$ref": "#/$defs/a"}}),
        "grammar_recursive_ref",
        "json.$ref",
    ),
    "regex open": (StructuredOutput(regex="(a"), "grammar_invalid", "regex"),
    "regex look-around": (StructuredOutput(regex="(?=a)b"), "grammar_invalid", "regex"),
    "regex too long": (StructuredOutput(regex="a" * 5000), "out_of_range", "regex"),
    "regex too large": (StructuredOutput(regex="((a{100}){100}){100}"), "grammar_too_large", "regex"),
    "pattern too large": (schema(type="string", pattern="(a{1000}){1000}"), "grammar_too_large", "json.pattern"),
    "no choice": (StructuredOutput(choice=[]), "grammar_unsatisfiable", "choice"),
    "empty choice": (StructuredOutput(choice=["a", ""]), "grammar_unsatisfiable", "choice"),
    "surrogate": (StructuredOutput(choice=["\ud800"]), "grammar_invalid", "choice"),
    "blank grammar": (StructuredOutput(grammar="  \n"), "grammar_invalid", "grammar"),
    "no start": (StructuredOutput(grammar='x: "a"'), "grammar_invalid", "grammar"),
    "unknown rule": (StructuredOutput(grammar="start: a"), "grammar_invalid", "grammar"),
    "left recursion": (StructuredOutput(grammar='start: start "a"'), "grammar_invalid", "grammar"),
    "ebnf unknown rule": (StructuredOutput(grammar="root ::= foo"), "grammar_invalid", "grammar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_constraint_is_refused_with_its_code_and_field(guard, name):
    spec, code, param = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        guard.check(spec)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert len(caught.value.message) <= 400
    guard.check(GOOD)


@pytest.mark.parametrize(
    "spec",
    [
        GOOD,
        StructuredOutput(json_object=True),
        StructuredOutput(json="true"),
        StructuredOutput(choice=["a", "b"]),
        StructuredOutput(grammar='start: "a"+'),
        StructuredOutput(grammar='root ::= "a"'),
        schema(type="object", properties={"next": {"$ref": "#"}}),
        schema(type="string", format="date"),
        nested(20),
    ],
)
def test_a_good_constraint_passes(guard, spec):
    guard.check(spec)
    guard.check(spec)


@pytest.mark.parametrize("given", [{}, {"regex": "a", "choice": ["b"]}, {"json": "{}", "json_object": True}])
def test_exactly_one_constraint_is_given(given):
    with pytest.raises(RequestError) as caught:
        StructuredOutput(**given)
    assert caught.value.code == "conflict"


def test_a_constraint_that_takes_too_long_is_stopped_and_the_next_one_served():
    guard = GrammarGuard(tokenizer_json(), VOCABULARY, [EOS], GrammarLimits(timeout_s=0.1))
    try:
        guard.check(GOOD)
        pid = guard._child.pid
        begin = time.monotonic()
        with pytest.raises(RequestError) as caught:
            guard.check(SLOW)
        assert caught.value.code == "grammar_timeout"
        assert time.monotonic() - begin < 5
        assert not Path(f"/proc/{pid}").exists()
        guard.check(StructuredOutput(regex="[0-9]"))
        assert guard._child.pid != pid
    finally:
        guard.close()


def test_a_constraint_that_nobody_waits_for_is_stopped_and_the_next_one_served():
    guard = GrammarGuard(tokenizer_json(), VOCABULARY, [EOS], GrammarLimits(timeout_s=3600))
    gone = threading.Event()
    try:
        guard.check(GOOD)
        pid = guard._child.pid
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(guard.check, StructuredOutput(regex="[0-9]+"), gone)
            gone.set()
            with pytest.raises(Abandoned):
                asked.result(60)
        if guard._child is not None:  # the caller had gone before the child was asked
            os.kill(pid, signal.SIGCONT)
        guard.check(StructuredOutput(regex="[0-9]"))
    finally:
        guard.close()


def test_what_was_found_good_is_known_without_a_wait(guard):
    guard.check(GOOD)
    assert guard.knows(GOOD)
    assert not guard.knows(StructuredOutput(regex="never asked"))


def test_a_child_that_died_is_replaced(guard):
    guard.check(GOOD)
    pid = guard._child.pid
    os.kill(pid, 9)
    for number in range(3):  # the one that meets the dead child may be refused, those after it are served
        try:
            guard.check(StructuredOutput(choice=[f"unseen {number}"]))
        except RequestError as error:
            assert error.code == "grammar_too_large" and number == 0
    assert guard._child.pid != pid


def test_a_closed_guard_leaves_no_process_and_says_so():
    guard = GrammarGuard(tokenizer_json(), VOCABULARY, [EOS])
    guard.check(GOOD)
    pid = guard._child.pid
    guard.close()
    guard.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ResourceError, match="closed"):
        guard.check(StructuredOutput(regex="new"))


def test_a_tokenizer_that_cannot_be_read_is_a_missing_resource_not_a_bad_request():
    guard = GrammarGuard("{}", VOCABULARY, [EOS])
    with pytest.raises(ResourceError):
        guard.check(GOOD)
    guard.close()


def test_limits_are_positive_and_the_flag_is_named():
    with pytest.raises(ConfigError, match="timeout_s"):
        GrammarLimits(timeout_s=0)
    with pytest.raises(RequestError) as caught:
        check_limits(StructuredOutput(regex="a" * 11), GrammarLimits(max_regex_chars=10))
    assert caught.value.flag == "--max-regex-chars"


@pytest.mark.parametrize(("pattern", "states"), [("abc", 3), ("a{5}", 5), ("(ab){3}c", 7), (r"[a-z]{2,9}\d", 10)])
def test_states_of_a_pattern(pattern, states):
    assert regex_states(pattern) == states
