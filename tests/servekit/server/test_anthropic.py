"""``/v1/messages`` through Anthropic's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.test_tools import CALL, WEATHER, forced

anthropic = pytest.importorskip("anthropic", reason="the client is not installed")
MESSAGES = "/v1/messages"
TOOL: Any = {"name": "weather", "description": "of a city", "input_schema": WEATHER["function"]["parameters"]}
GREEDY = {"temperature": 0}  # the client has no name for it
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as made:
        yield made


def test_a_message_says_what_the_chat_says(client: Any, http: httpx.Client) -> None:
    said = client.messages.create(model="M", system="Be brief.", messages=HELLO, max_tokens=12, extra_body=GREEDY)
    chat: dict[str, Any] = {"model": "M", "max_tokens": 12, "temperature": 0}
    chat["messages"] = [{"role": "system", "content": "Be brief."}, *HELLO]
    wanted = http.post("/v1/chat/completions", json=chat).json()
    assert said.content[0].text == wanted["choices"][0]["message"]["content"]
    usage = said.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == wanted["usage"]["prompt_tokens"]
    assert (usage.output_tokens, said.stop_reason) == (12, "max_tokens")


def test_streamed_events_build_the_whole(client: Any) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "max_tokens": 12, "extra_body": GREEDY}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == whole.stop_reason


def test_thinking_words_and_calls_are_blocks_of_their_own(client: Any) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "tools": [TOOL], "max_tokens": 300}
    asked["tool_choice"] = {"type": "any"}
    made = client.messages.create(
        **asked, extra_body={"temperature": 0.5, "tool_choice": {"type": "tool", "name": "weather"}}
    )
    assert [block.type for block in made.content] == ["tool_use"]
    assert made.content[0].input["city"] in ("Rome", "Oslo")
    assert made.stop_reason == "tool_use"
    with client.messages.stream(**asked | {"tool_choice": {"type": "tool", "name": "weather"}}) as stream:
        final = stream.get_final_message()
    assert final.content[0].input["city"] in ("Rome", "Oslo")
    assert final.stop_reason == "tool_use"


def test_a_free_call_after_thinking(client: Any, http: httpx.Client) -> None:
    """The client has no field that forces text, so the block form is read from the chat with the same parsers."""
    text = forced(f"<think>hm</think>I look. {CALL}")
    chat = {"model": "M", "messages": HELLO, "max_tokens": 300, "tools": [WEATHER]} | text
    message = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    call = message["tool_calls"][0]
    blocks: list[Any] = [
        {"type": "thinking", "thinking": message["reasoning_content"], "signature": ""},
        {"type": "text", "text": message["content"]},
        {"type": "tool_use", "id": call["id"], "name": "weather", "input": {"city": "Rome"}},
    ]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "sunny"}]}
    messages = [*HELLO, {"role": "assistant", "content": blocks}]
    messages.append({"role": "user", "content": [result, {"type": "text", "text": "thanks"}]})
    said = client.messages.create(model="M", messages=messages, max_tokens=4, extra_body=GREEDY)
    openai_form = [
        *HELLO,
        {"role": "assistant", "content": "I look. ", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
        {"role": "user", "content": "thanks"},
    ]
    body = {"model": "M", "messages": openai_form, "max_tokens": 4, "temperature": 0}
    wanted = http.post("/v1/chat/completions", json=body).json()
    assert said.content[0].text == wanted["choices"][0]["message"]["content"]


def test_a_stop_sequence_is_named(client: Any) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "max_tokens": 16, "extra_body": GREEDY}
    text = client.messages.create(**asked).content[0].text
    stopped = client.messages.create(**asked, stop_sequences=[text[3:5]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[3:5])


def test_a_beginning_is_continued(client: Any) -> None:
    count = client.messages.count_tokens(model="M", messages=HELLO).input_tokens
    said = client.messages.create(model="M", messages=HELLO, max_tokens=2)
    assert said.usage.input_tokens + said.usage.cache_read_input_tokens == count
    begun = [*HELLO, {"role": "assistant", "content": "The answer"}]
    template_ends = len("<s>assistant\n")
    assert (
        client.messages.count_tokens(model="M", messages=begun).input_tokens
        >= count + len("The answer") - template_ends
    )


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].source.type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "messages[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": {"type": "no"}}]}, "tools[0].input_schema.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"system": 5}, "system"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"nonsense": 5}, "nonsense"),
    ],
)
def test_faults_are_named_by_the_callers_fields(client: Any, changes: dict[str, Any], param: str) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "max_tokens": 4}
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**asked, extra_body=changes)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["param"] == param
    assert client.messages.create(**asked).content


def test_required_fields_are_required(http: httpx.Client) -> None:
    error = http.post(MESSAGES, json={"model": "M", "messages": HELLO}).json()["error"]
    assert (error["code"], error["param"]) == ("missing_field", "max_tokens")
