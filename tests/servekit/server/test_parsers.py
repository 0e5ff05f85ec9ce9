"""Text cut at any place gives the same deltas, joined, as the whole; and what the families write is understood."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servekit.server.parsers import Delta, Parser
from servekit.server.parsers.constrained import NamedParser, RequiredParser
from servekit.server.parsers.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from servekit.server.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    Pipeline,
    reasoning_parser_of,
    tool_parser_of,
)

Seen = tuple[str, str, list[tuple[str | None, str]]]  # reasoning, content, (name, arguments) of each call


def joined(deltas: list[Delta]) -> Seen:
    whole = Delta()
    names: dict[int, str | None] = {}
    arguments: dict[int, str] = {}
    for delta in deltas:
        whole.content += delta.content
        whole.reasoning += delta.reasoning
        for call in delta.calls:
            assert (call.name is not None) == (call.index not in names), "a name comes once, and first"
            names.setdefault(call.index, call.name)
            arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert list(names) == list(range(len(names)))
    return whole.reasoning, whole.content, [(names[i], arguments[i]) for i in names]


def parsed(make: Callable[[], Parser | Pipeline], pieces: list[str]) -> Seen:
    parser = make()
    return joined([*[parser.add(piece) for piece in pieces], parser.finish()])


def calls_of(seen: Seen) -> list[tuple[str | None, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in seen[2]]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.text(max_size=8)
    | st.sampled_from(["</tool_call>", '"}]']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["f", "get_weather", "a-b", "x9"])
keys = st.sampled_from(["city", "unit", "n_9"])
calls = st.lists(st.tuples(names, st.dictionaries(keys, values, max_size=3)), min_size=1, max_size=3)
words = st.text(alphabet="ab <[{\n", max_size=8)
Calls = list[tuple[str, dict[str, Any]]]


def hermes(made: Calls) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in made)


def llama(made: Calls) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in made)


def mistral(made: Calls) -> str:
    return "[TOOL_CALLS]" + json.dumps([{"name": n, "arguments": a} for n, a in made])


def mistral_v11(made: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in made)


def deepseek(made: Calls) -> str:
    each = [f"{CALL_BEGIN}function{SEP}{n}\n```json\n{json.dumps(a)}\n```{CALL_END}" for n, a in made]
    return CALLS_BEGIN + "\n".join(each) + CALLS_END


def deepseek_v31(made: Calls) -> str:
    return CALLS_BEGIN + "".join(f"{CALL_BEGIN}{n}{SEP}{json.dumps(a)}{CALL_END}" for n, a in made) + CALLS_END


def pythonic(made: Calls) -> str:
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in made) + "]"


def harmony(made: Calls) -> str:
    each = [
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{json.dumps(a)}<|call|>" for n, a in made
    ]
    return "<|start|>assistant".join(each)


FAMILIES: list[tuple[str, Callable[[Calls], str]]] = [
    ("hermes", hermes),
    ("llama3_json", llama),
    ("mistral", mistral),
    ("mistral", mistral_v11),
    ("deepseek_v3", deepseek),
    ("deepseek_v31", deepseek_v31),
    ("pythonic", pythonic),
    ("openai", harmony),
]


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("name", "write"), FAMILIES, ids=[write.__name__ for _, write in FAMILIES])
@settings(max_examples=120, deadline=None)
@given(data=st.data(), made=calls)
def test_calls_are_read_wherever_the_text_is_cut(
    name: str, write: Callable[[Calls], str], data: st.DataObject, made: Calls
) -> None:
    text = write(made)
    seen = parsed(TOOL_PARSERS[name], data.draw(cut(text)))
    assert calls_of(seen) == made
    assert seen[:2] == ("", "")


MARKS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *(CALLS_BEGIN, CALL_BEGIN, SEP, CALL_END, CALLS_END, "```json", "function", "<|channel|>", "<|message|>"),
    *("<|start|>", "<|end|>", "<|call|>", "analysis", "final", "commentary to=functions.f", "[THINK]", "[/THINK]"),
    *('{"name": "f"', '"arguments": {', '"a": 1}', "}", "]", "[f(a=1)", ", g(", ")", ";", ",", '"', "\\", " ", "\n"),
]
noise = st.lists(st.sampled_from(MARKS) | words, max_size=12).map("".join)
MAKERS: dict[str, Callable[[], Parser | Pipeline]] = {
    **TOOL_PARSERS,
    **{f"reasoning {name}": make for name, make in REASONING_PARSERS.items()},
    "required": RequiredParser,
    "named": lambda: NamedParser("f"),
    "both": lambda: Pipeline(REASONING_PARSERS["deepseek_r1"](), TOOL_PARSERS["hermes"]()),
}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=250, deadline=None)
@given(data=st.data(), text=noise)
def test_any_text_cut_anywhere_gives_what_the_whole_gives(name: str, data: st.DataObject, text: str) -> None:
    whole = parsed(MAKERS[name], [text])
    assert parsed(MAKERS[name], data.draw(cut(text))) == whole
    assert parsed(MAKERS[name], list(text)) == whole


plain = st.text(alphabet="ab <>|[]{}()\n\"'=,", max_size=30)


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek_v3", "llama3_json", "pythonic"])
@settings(max_examples=150, deadline=None)
@given(text=plain)
def test_an_answer_without_calls_is_given_out_whole(name: str, text: str) -> None:
    seen = parsed(TOOL_PARSERS[name], [text])
    if not seen[2]:
        assert seen[1] == text


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("hermes", 'I look.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n', "I look.\n"),
        ("mistral", 'I look.[TOOL_CALLS][{"name": "f", "arguments": {}}]', "I look."),
        ("deepseek_v3", f"I look.{CALLS_BEGIN}{CALL_BEGIN}f{SEP}{{}}{CALL_END}{CALLS_END}", "I look."),
        ("openai", "<|channel|>final<|message|>I look.<|start|>assistant to=functions.f<|message|>{}", "I look."),
    ],
)
def test_words_before_a_call_are_content(name: str, text: str, content: str) -> None:
    assert parsed(TOOL_PARSERS[name], [text]) == ("", content, [("f", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"id": 5, "name": "f", "arguments": {"a": 1}}',
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
    ],
)
def test_hermes_is_read_in_its_dialects(text: str) -> None:
    assert calls_of(parsed(TOOL_PARSERS["hermes"], [text])) == [("f", {"a": 1})]


def test_arguments_come_while_they_are_written() -> None:
    parser = TOOL_PARSERS["hermes"]()
    parser.add('<tool_call>{"name": "f", "arguments": {"city": "Par')
    assert parser.add("is").calls[0].arguments == "is"
    assert not parser.add('"').content


def test_python_is_read_and_never_run() -> None:  # grm-025
    text = "[f(a=-1.5, b='it\\'s', c=[1, (2, None)], d={'k': True}, e=\"\\u00e9\\n\")]"
    call = ast.parse(text, mode="eval").body.elts[0]  # type: ignore[attr-defined]
    wanted = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    found = calls_of(parsed(TOOL_PARSERS["pythonic"], [text]))[0][1]
    assert found == json.loads(json.dumps(wanted))
    for evil in (
        '[f(x=__import__("os").system("x"))]',
        "[f(a=__import__('os').system('x'))]",
        "[f(a=g(1))]",
        "[" * 500,
        f"[f(a={'[' * 500})]",
    ):
        assert parsed(TOOL_PARSERS["pythonic"], [evil]) == ("", evil, [])


def test_a_call_that_never_ends_is_content_soon() -> None:  # grm-026
    text = "[f(" + "a=1," * 20_000
    assert parsed(TOOL_PARSERS["pythonic"], [text]) == ("", text, [])


def test_channels_are_told_apart() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look. <|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    assert parsed(TOOL_PARSERS["openai"], [text]) == ("Hm.", "I look. ", [("f", '{"a": 1}')])


@pytest.mark.parametrize(
    ("name", "text", "seen"),
    [
        ("deepseek_r1", "so it is</think>\n\nYes", ("so it is", "Yes")),
        ("deepseek_r1", "<think>so", ("so", "")),
        ("qwen3", "<think>\nso</think>\n\nYes", ("\nso", "Yes")),
        ("qwen3", "Yes, <think>", ("", "Yes, <think>")),
        ("mistral", "[THINK]so[/THINK]Yes", ("so", "Yes")),
    ],
)
def test_reasoning_is_split_off(name: str, text: str, seen: tuple[str, str]) -> None:
    assert parsed(REASONING_PARSERS[name], [text])[:2] == seen


def test_calls_after_reasoning_are_found_and_those_within_are_not() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    seen = parsed(MAKERS["both"], [f"maybe {call}?</think>\n{call}"])
    assert seen == (f"maybe {call}?", "", [("f", "{}")])


def test_a_large_answer_is_read_in_time_linear_in_its_length() -> None:
    text = "[f(a='" + "x" * 300_000 + "')]"
    assert len(calls_of(parsed(TOOL_PARSERS["pythonic"], [text]))[0][1]["a"]) == 300_000


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes", ""),
        ("{{ '<tool_call>' }}</think>x<|im_start|>assistant\n", "hermes", "qwen3"),
        ("<｜tool▁calls▁begin｜></think>..." + "x" * 500 + "<｜Assistant｜><think>\\n", "deepseek_v3", "deepseek_r1"),
        ("<|start|>assistant<|channel|>", "openai", "openai_gptoss"),
        ("plain", "", ""),
    ],
)
def test_the_template_tells_the_family(template: str, tools: str, reasoning: str) -> None:
    assert (tool_parser_of(template), reasoning_parser_of(template)) == (tools, reasoning)
