"""``/v1/responses`` through the official client: whole, streamed, stored, in the background."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.test_tools import CALL, WEATHER, forced

from servekit.server.response_store import ResponseStore, Stored

RESPONSES = "/v1/responses"
TOOL: Any = {"type": "function", **WEATHER["function"]}
CHOICE: Any = {"type": "function", "name": "weather"}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_a_response_says_what_the_chat_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "temperature": 0}
    said = client.responses.create(**asked, input="hello", instructions="Be brief.", max_output_tokens=12)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(**asked, messages=messages, max_tokens=12)
    assert said.output_text == chat.choices[0].message.content
    assert said.usage.input_tokens == chat.usage.prompt_tokens
    assert said.usage.output_tokens == 12
    assert (said.status, said.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (said.instructions, said.max_output_tokens, said.temperature) == ("Be brief.", 12, 0)


def test_streamed_events_build_the_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "input": "hello", "max_output_tokens": 40, "extra_body": forced("hello you")}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    short = list(client.responses.create(**asked | {"max_output_tokens": 3}, stream=True))
    assert [event.sequence_number for event in short] == list(range(len(short)))
    assert short[-1].type == "response.incomplete"


def test_reasoning_and_calls_are_items_of_their_own(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "input": "hello", "tools": [TOOL], "max_output_tokens": 300}
    asked["extra_body"] = forced(f"<think>hm</think>I look. {CALL}")
    whole = client.responses.create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output[0].content[0].text == "hm"
    assert (whole.output[2].name, json.loads(whole.output[2].arguments)) == ("weather", {"city": "Rome"})
    assert whole.status == "completed"
    done: list[Any] = []
    arguments = ""
    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.output_item.done":
            done.append(event.item)
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
    assert [item.type for item in done] == ["reasoning", "message", "function_call"]
    assert done[1].content[0].text == "I look. "
    assert arguments == done[2].arguments == whole.output[2].arguments


def test_a_call_and_its_output_go_on_from_the_stored_response(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "tools": [TOOL]}
    first = client.responses.create(**asked, input="hello", tool_choice=CHOICE, max_output_tokens=60)
    call = first.output[0]
    output: list[Any] = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    later = client.responses.create(
        **asked, input=output, previous_response_id=first.id, max_output_tokens=4, temperature=0
    )
    user: Any = {"role": "user", "content": "hello"}
    same = client.responses.create(**asked, input=[user, call.to_dict(), *output], max_output_tokens=4, temperature=0)
    assert later.output_text == same.output_text
    assert later.usage.input_tokens == same.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(later.id).output_text == later.output_text
    client.responses.delete(later.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(later.id)


def test_pydantic_models_are_filled(client: openai.OpenAI) -> None:
    class Place(BaseModel):
        ready: bool

    answer = client.responses.parse(model="M", input="hello", text_format=Place, max_output_tokens=60)
    assert isinstance(answer.output_parsed, Place)


def test_what_runs_in_the_background_is_asked_for_and_cancelled(client: openai.OpenAI) -> None:
    long: dict[str, Any] = {"model": "M", "input": "hello", "background": True}
    short = client.responses.create(**long, max_output_tokens=5)
    assert short.status in ("queued", "in_progress")
    assert wait_until(lambda: client.responses.retrieve(short.id).status in ("completed", "incomplete"))
    assert client.responses.retrieve(short.id).output_text
    running = client.responses.create(**long, max_output_tokens=900, text={"format": {"type": "json_object"}})
    cancelled = client.responses.cancel(running.id)
    assert cancelled.status in ("cancelled", "incomplete", "completed")
    assert client.responses.retrieve(running.id).status == cancelled.status
    assert client.responses.cancel(short.id).status != "cancelled"
    front = client.responses.create(model="M", input="x", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(front.id)


def test_a_stream_from_the_background_may_be_left_and_taken_up_again(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "input": "hello", "max_output_tokens": 300, "background": True}
    asked["extra_body"] = forced("a text that is long enough to be left " * 5)
    stream = client.responses.create(**asked, stream=True)
    seen = [next(stream) for _ in range(6)]
    stream.close()  # the response goes on without a reader
    response_id = seen[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
    events = [*seen, *rest]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole = client.responses.retrieve(response_id)
    assert events[-1].type == f"response.{whole.status}"
    assert events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    again = list(client.responses.retrieve(response_id, stream=True))
    assert [event.to_dict() for event in again] == [event.to_dict() for event in events]
    assert list(client.responses.retrieve(response_id, stream=True, starting_after=len(events))) == []


def test_the_stream_of_a_cancelled_response_ends(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "input": "hello", "max_output_tokens": 900, "background": True}
    stream = client.responses.create(**asked, stream=True, text={"format": {"type": "json_object"}})
    response_id = next(stream).response.id
    status = client.responses.cancel(response_id).status
    assert list(stream)[-1].type == f"response.{status}"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("stream=true", "unsupported"),
        ("stream=maybe", "unsupported"),
        ("stream=true&starting_after=-1", "out_of_range"),
        ("starting_after=x", "out_of_range"),
        ("starting_after=3", "conflict"),
    ],
)
def test_what_was_not_made_in_the_background_is_not_streamed_again(http: httpx.Client, query: str, code: str) -> None:
    made = http.post(RESPONSES, json=body()).json()
    answer = http.get(f"{RESPONSES}/{made['id']}?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="M", input="hello", store=False, max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "M", "input": "hi", "max_output_tokens": 4} | changes


PART = {"type": "input_image", "image_url": "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkwBADs="}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "out_of_range", "input"),
    ({"input": 5}, "invalid_type", "input"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "unsupported_role", "input[0].role"),
    ({"input": [{"role": "user", "content": [PART]}]}, "unsupported", "input[0].content[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "conflict", "input[0]"),
    ({"max_output_tokens": 0}, "out_of_range", "max_output_tokens"),
    ({"max_output_tokens": 1024}, "context_length_exceeded", "input"),
    ({"tools": [{"type": "web_search"}]}, "unsupported", "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "out_of_range", "tools[0].name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "out_of_range", "tool_choice.name"),
    (
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": 5}}}},
        "grammar_invalid",
        "text.format",
    ),
    ({"background": True, "store": False}, "conflict", "store"),
    ({"nonsense": 1}, "unknown_field", "nonsense"),
    ({"temperature": 9}, "out_of_range", "temperature"),
]


@pytest.mark.parametrize(("changes", "code", "param"), BAD)
def test_faults_are_named_by_the_callers_fields(
    http: httpx.Client, changes: dict[str, Any], code: str, param: str
) -> None:
    answer = http.post(RESPONSES, json=body(**changes))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert error["param"].startswith(param)
    assert http.post(RESPONSES, json=body()).status_code == 200


def test_a_response_that_is_not_there_is_not_found(http: httpx.Client) -> None:
    for answer in (
        http.get(f"{RESPONSES}/resp_no"),
        http.post(f"{RESPONSES}/resp_no/cancel"),
        http.post(RESPONSES, json=body(previous_response_id="resp_no")),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")


def stored(number: int, tenant: str = "", text: str = "") -> Stored:
    return Stored(tenant, {"id": f"r{number}", "text": text}, [])


def test_a_store_keeps_the_latest_within_its_bounds_and_tenants_apart() -> None:
    store = ResponseStore(3, 1000)
    for number in range(5):
        store.put(stored(number, "a"))
    assert [store.get(f"r{number}", "a").response["id"] for number in (2, 3, 4)] == ["r2", "r3", "r4"]
    for number in (0, 1):
        with pytest.raises(ValueError, match="no response"):
            store.get(f"r{number}", "a")
    with pytest.raises(ValueError, match="no response"):
        store.get("r4", "b")
    store.put(stored(9, "a", "x" * 990))
    with pytest.raises(ValueError, match="no response"):
        store.get("r4", "a")
