"""Under ``tool_choice: auto``: text is free, and what a family's parser would read as a call obeys its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.servekit.server.processes import ServerProcess
from tokenizers import AddedToken, Tokenizer

from common_platform.embedded import smollm2
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.matcher import GrammarCompiler
from servekit.server.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, Pipeline
from servekit.server.strict_calls import FAMILIES, strict_grammar
from servekit.server.strict_form import Calls

SPECIAL = {
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
    "llama3_json": ("<|python_tag|>",),
    "deepseek_v3": (
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    "openai": ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>"),
}
SPECIAL["deepseek_v31"] = SPECIAL["deepseek_v3"]


def tool(name: str, key: str, *, strict: bool = True) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"$ref": f"#/$defs/{name}_number"}},
        "required": [key],
        "additionalProperties": False,
        "$defs": {f"{name}_number": {"type": "integer"}},
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


TOOLS = [tool("add", "x"), tool("say", "y", strict=False)]
WRITTEN = {  # a call as each family writes it; %s: the arguments
    "hermes": '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    "llama3_json": '{"name": "%s", "parameters": %s}',
    "mistral": '[TOOL_CALLS][{"name": "%s", "arguments": %s}]',
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "openai": "<|channel|>commentary to=functions.%s <|constrain|>json<|message|>%s",
}
WHOLE = ("llama3_json", "pythonic")  # an answer is text, or calls
TEXT = {"openai": "<|channel|>final<|message|>Hello, {}.<|end|>"} | dict.fromkeys(WHOLE, "Hello, {}.")


def written(family: str, name: str, arguments: str) -> str:
    if family != "pythonic":
        return WRITTEN[family] % (name, arguments)
    found = json.loads(arguments)
    said = [f"{key}={json.dumps(value)}" for key, value in found.items()] if isinstance(found, dict) else [arguments]
    return f"[{name}({', '.join(said)})]"


class Judge:
    """The grammar of one family beside a tokenizer that has its special tokens."""

    def __init__(self, family: str, reasoning: str = "", *, is_parallel: bool = True) -> None:
        self.tokenizer = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
        self.tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL.get(family, ())])
        added = self.tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        calls = Calls(tools=TOOLS, is_parallel=is_parallel, reasoning=reasoning, special_ids=special)
        lark = strict_grammar(family, calls)
        assert lark is not None
        compiler = GrammarCompiler(self.tokenizer.to_str(), self.tokenizer.get_vocab_size(), [2])
        self.state = compiler.compile(StructuredOutput(lark=lark))

    def allows(self, text: str) -> bool:
        """Whether an answer may be ``text``, and end there."""
        state = self.state.copy()
        return state.accept(self.tokenizer.encode(text, add_special_tokens=False).ids) and state.is_complete


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_free_and_calls_obey_their_schema(family: str) -> None:
    judge = Judge(family)
    text = TEXT.get(family, "Hello, {}.\n")
    assert judge.allows(text.removesuffix("<|end|>"))
    good = [written(family, "add", '{"x": 1}'), written(family, "say", '{"anything": ["goes"]}')]
    bad = [("add", '{"x": "1"}'), ("add", "{}"), ("other", "{}"), ("say", "[]")]
    bad = [written(family, *call) for call in bad]
    assert [judge.allows(one) for one in good] == [True, True]
    assert not any(judge.allows(one) for one in bad)
    if family == "openai":
        good = [f"{text}<|start|>assistant{one}" for one in good]
        bad = [f"{text}<|start|>assistant{one}" for one in bad]
    elif family not in WHOLE:
        good, bad = [text + one for one in good], [text + one for one in bad]
    assert all(judge.allows(one) for one in good)
    assert not any(judge.allows(one) for one in bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_allowed_is_read_as_calls(family: str) -> None:
    parser = TOOL_PARSERS[family]()
    delta = parser.add(written(family, "add", '{"x": 1}'))
    delta.add(parser.finish())
    assert [(call.name, json.loads(call.arguments)) for call in delta.calls] == [("add", {"x": 1})]


def test_one_call_is_one_call() -> None:
    call = WRITTEN["hermes"] % ("add", '{"x": 1}')
    assert Judge("hermes").allows(f"{call}\n{call}")
    single = Judge("hermes", is_parallel=False)
    assert single.allows(call)
    assert single.allows(call + " done")
    assert not single.allows(f"{call}\n{call}")


def test_other_forms_of_a_family() -> None:
    assert Judge("mistral").allows('Hm.[TOOL_CALLS]add[ARGS]{"x": 2}')
    assert not Judge("mistral").allows('[TOOL_CALLS]add[ARGS]{"x": "2"}')
    assert Judge("llama3_json").allows('<|python_tag|>{"name": "add", "parameters": {"x": 2}}')
    two = '{"name": "add", "parameters": {"x": 2}}; {"name": "say", "parameters": {}}'
    assert Judge("llama3_json").allows(two)
    assert Judge("openai").allows(' to=functions.add<|channel|>commentary json<|message|>{"x": 1}')


@pytest.mark.parametrize(
    ("family", "reasoning", "begin", "end"),
    [
        ("hermes", "qwen3", "<think>", "</think>"),
        ("deepseek_v3", "deepseek_r1", "", "</think>"),
        ("mistral", "mistral", "[THINK]", "[/THINK]"),
    ],
)
def test_reasoning_is_free_too(family: str, reasoning: str, begin: str, end: str) -> None:
    judge = Judge(family, reasoning)
    good, bad = (WRITTEN[family] % ("add", text) for text in ('{"x": 1}', '{"x": []}'))
    musing = "<tool_call>?" if family == "hermes" else "a call?"
    assert judge.allows(f"{begin}{musing}{end}\n{good}")
    assert judge.allows(f"{begin}{musing}{end}\nHello.")
    assert not judge.allows(f"{begin}{musing}{end}\n{bad}")
    assert not judge.allows(f"{begin}{musing}"), "it ends before the answer does"
    if begin:
        assert judge.allows(good)
        assert not judge.allows(bad)
    pipeline = Pipeline(REASONING_PARSERS[reasoning](), TOOL_PARSERS[family]())
    delta = pipeline.add(f"{begin}{musing}{end}\n{good}")
    delta.add(pipeline.finish())
    assert delta.reasoning == musing
    assert delta.calls[0].name == "add"


TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITY = {
    "type": "object",
    "properties": {"town": {"enum": ["Bergen", "Turin"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["town", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template: Path = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    server = ServerProcess(smollm2(), "--chat-template", str(template), "--max-model-len", "2048")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made
    server.stop()


def talk_of_weather() -> list[Any]:
    """A model that small does as it has done: it calls, and with arguments that no schema asked for."""
    said: list[Any] = []
    for number, town in enumerate(("Oslo", "Paris", "Rome")):
        call = {"name": "weather", "arguments": json.dumps({"place": town})}
        said.append({"role": "user", "content": f"What is the weather in {town}?"})
        about = {"id": f"c{number}", "type": "function", "function": call}
        said.append({"role": "assistant", "content": "", "tool_calls": [about]})
        said.append({"role": "tool", "tool_call_id": f"c{number}", "content": "Rain."})
        said.append({"role": "assistant", "content": "It rains."})
    return [*said, {"role": "user", "content": "What is the weather in Lima?"}]


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_calls_freely_is_held_to_a_strict_schema(client: openai.OpenAI, strict: bool) -> None:
    function = {"name": "weather", "parameters": CITY, "strict": strict}
    asked: dict[str, Any] = {
        "model": "M",
        "messages": talk_of_weather(),
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 60,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"
    if not strict:
        assert "place" in arguments, "as it has done before: without strict nothing holds it"
        return
    assert set(arguments) == {"town", "days"}
    assert arguments["town"] in ("Bergen", "Turin")
    streamed = "".join(
        call.function.arguments or ""
        for event in client.chat.completions.create(**asked, stream=True)
        for choice in event.choices
        for call in choice.delta.tool_calls or ()
    )
    assert json.loads(streamed) == arguments


def test_a_model_that_answers_in_words_may(client: openai.OpenAI) -> None:
    function = {"name": "weather", "parameters": CITY, "strict": True}
    answer = client.chat.completions.create(
        model="M",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        tools=[{"type": "function", "function": function}],
        max_tokens=12,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")


PLACE = {
    "type": "object",
    "properties": {
        "town": {"enum": ["Bergen", "Turin"]},
        "is_near": {"type": "boolean"},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["town"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("said", "is_allowed"),
    [
        ('[f(town="Turin")]', True),
        ('[f(town="Turin", is_near=True), f(town="Bergen", days=[1, 2])]', True),
        ('[f(town="Turin",is_near=false,days=[])]', True),
        ("[f()]", False),
        ('[f(is_near=True, town="Turin")]', False),
        ('[f(town="Oslo")]', False),
        ('[f(town="Turin", is_near="yes")]', False),
        ('[f(town="Turin", more=1)]', False),
        ('[f(town="Turin", town="Turin")]', False),
        ('[f("Turin")]', False),
        ('I call. [f("Oslo")]', True),
    ],
)
def test_named_arguments_stand_in_their_order_or_not_at_all(said: str, is_allowed: bool) -> None:
    """What is allowed is read as the same calls; what stands behind other text is none."""
    calls = Calls(tools=[{"function": {"name": "f", "parameters": PLACE, "strict": True}}], **ALONE)
    lark = strict_grammar("pythonic", calls)
    tokenizer = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [2])
    state = compiler.compile(StructuredOutput(lark=lark))
    found = state.accept(tokenizer.encode(said, add_special_tokens=False).ids) and state.is_complete
    assert found is is_allowed
    parser = TOOL_PARSERS["pythonic"]()
    delta = parser.add(said)
    delta.add(parser.finish())
    if is_allowed:
        assert bool(delta.calls) is said.startswith("[")
        assert all(json.loads(call.arguments)["town"] in ("Bergen", "Turin") for call in delta.calls)


ALONE: dict[str, Any] = {"is_parallel": True, "reasoning": "", "special_ids": {}}


@pytest.mark.parametrize(
    "schema", [{"anyOf": [PLACE]}, {"properties": {"a b": {}}}, PLACE | {"additionalProperties": {}}]
)
def test_arguments_without_plain_names_cannot_be_held(schema: dict[str, Any]) -> None:
    tools = [{"function": {"name": "f", "parameters": schema, "strict": True}}]
    assert strict_grammar("pythonic", Calls(tools=tools, **ALONE)) is None
    good = [{"function": {"name": "f", "parameters": PLACE, "strict": True}}]
    assert strict_grammar("pythonic", Calls(tools=good, **ALONE | {"reasoning": "qwen3"})) is None


def test_what_cannot_be_held_to_a_schema_is_said_and_python_can(tiny_model: Path) -> None:
    server = ServerProcess(tiny_model, "--tool-call-parser", "pythonic")
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            asked: dict[str, Any] = {"model": "M", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
            free = {"name": "f", "parameters": {"anyOf": [PLACE]}, "strict": True}
            with pytest.raises(openai.BadRequestError) as raised:
                client.chat.completions.create(**asked, tools=[{"type": "function", "function": free}])
            assert raised.value.param == "tools[0].function.strict"
            for tools in (TOOLS, [TOOLS[1]]):
                assert client.chat.completions.create(**asked, tools=tools).choices
    finally:
        server.stop()
