"""Tools, reasoning and templates through a real server and the official client."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tests.servekit.server.processes import ServerProcess, is_alive, wait_until
from tests.servekit.server.raw import connect, has_answer, post_of
from tests.servekit.server.rows import CHAT, LOOP, chat

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def forced(text: str) -> dict[str, Any]:
    """The tiny model writes nothing sensible, so a regex tells it what to write."""
    return {"structured_outputs": {"regex": re.escape(text).replace("/", "\\/")}}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def other(tiny_model: Path) -> Iterator[ServerProcess]:
    """Llama's calls, whose marks are special tokens; callers' templates, for which there is one second."""
    flags = ("--tool-call-parser", "llama3_json", "--allow-request-chat-template", "--template-timeout-s", "1")
    started = ServerProcess(tiny_model, *flags)
    yield started
    started.stop()


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[dict[str, Any], str | None, int]:
    """The message put together from its deltas, the reason of its end, and how many deltas had calls."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    reason, pieces = None, 0
    for chunk in client.chat.completions.create(model="M", messages=HELLO, stream=True, **asked):
        choice = chunk.choices[0]
        message["content"] += choice.delta.content or ""
        message["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        reason = choice.finish_reason or reason
        pieces += bool(choice.delta.tool_calls)
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                message["calls"].append([call.function.name, ""])
            message["calls"][call.index][1] += call.function.arguments
    return message, reason, pieces


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_among_words_are_found_whole_and_streamed(client: openai.OpenAI, parallel: bool) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER, CLOCK], "max_tokens": 400, "parallel_tool_calls": parallel}
    asked["extra_body"] = forced(f"<think>hm</think>I look. {CALL}\n{CALL}")
    choice = client.chat.completions.create(model="M", messages=HELLO, **asked).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("weather", '{"city": "Rome"}')] * (2 if parallel else 1)
    assert choice.message.content == "I look. "
    assert choice.message.reasoning_content == "hm"
    assert choice.finish_reason == "tool_calls"
    assert len({call.id for call in choice.message.tool_calls}) == len(calls)

    def is_streamed_in_pieces() -> bool:
        """Once more where the server was behind, so that all came together."""
        message, reason, pieces = streamed(client, **asked)
        assert [tuple(call) for call in message["calls"]] == calls
        assert (message["content"], message["reasoning"], reason) == ("I look. ", "hm", "tool_calls")
        return pieces > len(calls)

    assert wait_until(is_streamed_in_pieces), "arguments come as they are written"


def test_reasoning_is_counted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "M",
        "messages": HELLO,
        "max_tokens": 60,
        "extra_body": forced("<think>hm</think>ok"),
    }
    usage = client.chat.completions.create(**asked).usage
    assert 2 <= usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_fit_their_schemas(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300, "seed": 1}
    asked |= {"parallel_tool_calls": False, "temperature": 0.5}
    if stream:
        message, reason, _ = streamed(client, **asked)
        calls = message["calls"]
    else:
        choice = client.chat.completions.create(model="M", messages=HELLO, **asked).choices[0]
        calls, reason = (
            [[c.function.name, c.function.arguments] for c in choice.message.tool_calls],
            choice.finish_reason,
        )
        assert choice.message.content is None
    assert reason == "tool_calls"
    assert [name for name, _ in calls] == ["weather"]
    assert json.loads(calls[0][1])["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called(client: openai.OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    asked: dict[str, Any] = {"tools": [CLOCK, WEATHER], "tool_choice": choice, "max_tokens": 100}
    if stream:
        message, reason, _ = streamed(client, **asked)
        calls = message["calls"]
    else:
        made = client.chat.completions.create(model="M", messages=HELLO, **asked).choices[0]
        calls, reason = [[c.function.name, c.function.arguments] for c in made.message.tool_calls], made.finish_reason
    assert reason == "stop"
    assert calls[0][0] == "weather"
    assert json.loads(calls[0][1])["city"] in ("Rome", "Oslo")


def test_tools_are_shown_to_the_model_unless_it_may_not_call(http: httpx.Client) -> None:
    def prompt(**more: Any) -> int:
        return http.post(CHAT, json=chat(tools=[WEATHER], **more)).json()["usage"]["prompt_tokens"]

    bare = http.post(CHAT, json=chat()).json()["usage"]["prompt_tokens"]
    assert prompt() > bare + 50
    assert prompt(tool_choice="none") == bare


def test_a_conversation_with_calls_and_their_answers_goes_on(client: openai.OpenAI) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: list[Any] = [*HELLO, {"role": "assistant", "tool_calls": [called], "content": None}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "sunny"})
    answer = client.chat.completions.create(model="M", messages=messages, tools=[WEATHER], max_tokens=4)  # type: ignore[list-item]
    assert answer.choices[0].message.role == "assistant"


def test_definitions_of_functions_move_to_the_top(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/X"}},
        "required": ["x"],
        "$defs": {"X": {"enum": [1]}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema | {"additionalProperties": False}}}
    body = chat(tools=[tool], tool_choice="required", max_tokens=200, parallel_tool_calls=False)
    answer = http.post(CHAT, json=body).json()
    assert json.loads(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    clash = json.loads(json.dumps(tool).replace('"enum": [1]', '"enum": [2]').replace('"f"', '"g"'))
    refused = http.post(CHAT, json=body | {"tools": [tool, clash]}).json()["error"]
    assert (refused["code"], refused["param"]) == ("conflict", "tools[1].function.parameters.$defs.X")


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "no"}}},
            "out_of_range",
            "tool_choice.function.name",
        ),
        ({"tool_choice": {"type": "wish"}}, "unsupported", "tool_choice.type"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "conflict", "tool_choice"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "conflict", "add_generation_prompt"),
        ({"reasoning_effort": "high"}, "unsupported", "reasoning_effort"),
    ],
)
def test_what_does_not_go_together_is_named(http: httpx.Client, more: dict[str, Any], code: str, param: str) -> None:
    error = http.post(CHAT, json=chat(tools=[WEATHER], **more)).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_the_last_message_may_be_continued(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    ids = http.post(CHAT, json=chat(messages=messages, continue_final_message=True, return_token_ids=True)).json()
    text = http.post("/detokenize", json={"model": "M", "tokens": ids["prompt_token_ids"]}).json()["prompt"]
    assert text.endswith("The answer is")


def test_special_tokens_are_shown_to_the_parser_and_not_to_the_caller(other: ServerProcess) -> None:
    call = '{"name": "weather", "parameters": {"city": "Rome"}}'
    with other.client() as http:
        for text, content, number in ((call, None, 1), ("hello", "hello", 0)):
            body = chat(tools=[WEATHER], max_tokens=100, **forced(text))
            choice = http.post(CHAT, json=body).json()["choices"][0]
            assert choice["message"]["content"] == content
            assert len(choice["message"].get("tool_calls", ())) == number


@pytest.mark.parametrize(
    ("template", "code"),
    [
        pytest.param(LOOP, "chat_template_limit", id="srv-128"),
        pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat_template_error", id="srv-129"),
        pytest.param("{{ 'a'*10**10 }}", "chat_template_limit", id="srv-130"),
        pytest.param(SLOW, "chat_template_limit", id="slow"),
        pytest.param("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "chat_template_limit", id="long"),
        pytest.param("{{ raise_exception('no') }}", "chat_template_error", id="raises"),
        pytest.param("{% if %}", "chat_template_error", id="syntax"),
        pytest.param("{{ messages.append(1) }}", "chat_template_error", id="changes"),
    ],
)
def test_a_callers_template_is_bounded_and_hurts_nobody(other: ServerProcess, template: str, code: str) -> None:
    with other.client() as http:
        answer = http.post(CHAT, json=chat(chat_template=template))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, "chat_template"), error
        assert "class" not in error["message"]
        assert http.post(CHAT, json=chat()).status_code == 200


def processor_s(pids: list[int]) -> float:
    """Seconds of processor time that these have used."""
    used = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(psutil.Process(pid).cpu_times()[:2])
    return used


def test_a_slow_template_of_one_caller_keeps_nobody_waiting(tiny_model: Path) -> None:
    """It has ten minutes, and its caller leaves amid them: that ends it."""
    server = ServerProcess(tiny_model, "--allow-request-chat-template", "--template-timeout-s", "600")
    try:
        with server.client() as http, connect(server) as first:
            assert http.post(CHAT, json=chat()).status_code == 200
            own = server.running("servekit.server.template_child")
            first.sendall(post_of(chat(chat_template=SLOW), path=CHAT))

            def at_work() -> list[int]:
                return [pid for pid in server.running("servekit.server.template_child") if pid not in own]

            assert wait_until(lambda: processor_s(at_work()) > 1)
            (slow,) = at_work()
            assert http.post(CHAT, json=chat()).status_code == 200
            assert not has_answer(first)
            assert is_alive(slow)
            first.close()
            assert wait_until(lambda: not is_alive(slow))
    finally:
        server.stop()


def test_a_callers_template_is_used_with_its_own_variables(other: ServerProcess) -> None:
    with other.client() as http:
        body = {
            "model": "M",
            "messages": HELLO,
            "chat_template": "<{{ mood }}>",
            "chat_template_kwargs": {"mood": "calm"},
        }
        tokens = http.post("/tokenize", json=body).json()["tokens"]
        assert http.post("/detokenize", json={"model": "M", "tokens": tokens}).json()["prompt"] == "<calm>"


def test_the_models_own_template_that_runs_away_is_our_fault(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% if messages[0].content == 'x' %}" + SLOW + "{% endif %}ok")
    server = ServerProcess(tmp_path, "--template-timeout-s", "0.5")
    try:
        with server.client() as http:
            answer = http.post(CHAT, json=chat(messages=[{"role": "user", "content": "x"}]))
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "chat_template_limit")
            assert answer.json()["error"]["message"].startswith("internal error, id req-")
            assert http.post(CHAT, json=chat()).status_code == 200
            refused = http.post(CHAT, json=chat(tools=[WEATHER]))
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    finally:
        server.stop()
