"""The official client sees an OpenAI server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from tests.servekit.server.processes import ServerProcess

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["M"]
    assert client.models.retrieve("M").id == "M"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("n", [1, 3])
def test_joined_chat_deltas_equal_the_whole_answer(client: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "max_tokens": 24, "n": n, "temperature": 0.9, "seed": 7}
    whole = client.chat.completions.create(**asked)
    texts, reasons = [""] * n, [None] * n
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0  # the first call left its prompt behind
    assert whole.id.startswith("chatcmpl-")
    assert whole.system_fingerprint is None


def test_completions_of_texts_and_token_ids_come_in_the_order_of_the_prompts(client: openai.OpenAI) -> None:
    prompts = ["one", "three", "two"]
    together = client.completions.create(model="M", prompt=prompts, max_tokens=6, temperature=0, n=2)
    alone = [client.completions.create(model="M", prompt=p, max_tokens=6, temperature=0) for p in prompts]
    texts = [choice.text for choice in together.choices]
    assert texts == [answer.choices[0].text for answer in alone for _ in range(2)]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)


def test_streamed_completions_equal_the_whole_with_echo_and_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "prompt": ["abc", "xy"], "max_tokens": 5, "temperature": 0}
    asked |= {"echo": True, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts, tokens, offsets = ["", ""], [[], []], [[], []]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    first = whole.choices[0]
    assert first.text.startswith("abc")
    assert first.logprobs.token_logprobs[0] is None
    assert len(first.logprobs.tokens) == 3 + 5
    assert all(len(top) in (2, 3) for top in first.logprobs.top_logprobs[1:])


def test_chat_logprobs_name_the_greedy_token_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="M", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "prompt": "abc", "max_tokens": 16, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[4:6]
    choice = client.completions.create(**asked, stop=stop).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_content_parts_are_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    asked: dict[str, Any] = {"model": "M", "max_completion_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked, messages=HELLO)
    split = client.chat.completions.create(**asked, messages=[{"role": "user", "content": parts}])
    assert split.choices[0].message.content == whole.choices[0].message.content


def test_best_of_returns_the_most_likely(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "M",
        "prompt": "abc",
        "max_tokens": 4,
        "seed": 3,
        "temperature": 1.5,
        "logprobs": 0,
    }
    every = client.completions.create(**asked, n=4)
    best = client.completions.create(**asked, best_of=4)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every.choices]
    assert best.choices[0].text == every.choices[means.index(max(means))].text


def test_errors_are_the_clients_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="M", prompt="x", temperature=9)
    assert (caught.value.code, caught.value.param) == ("out_of_range", "temperature")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="M", messages=HELLO, max_completion_tokens=1024)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def _text(client: openai.AsyncOpenAI, prompt: str) -> str:
    pieces = []
    async for chunk in await client.completions.create(
        model="M", prompt=prompt, max_tokens=40, temperature=0, stream=True
    ):
        pieces += [choice.text for choice in chunk.choices]
    return "".join(pieces)


def test_sixteen_streams_at_once_equal_each_alone_and_a_bad_prompt_hurts_none(server: ServerProcess) -> None:
    prompts = [f"prompt number {i}" for i in range(16)]

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            alone = [await _text(client, prompt) for prompt in prompts]
            streams = [asyncio.create_task(_text(client, prompt)) for prompt in prompts]
            await asyncio.sleep(0.05)
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="M", prompt="x" * 2000, max_tokens=4)
            assert await asyncio.gather(*streams) == alone

    asyncio.run(run())


def test_json_schema_strict_gives_json_that_fits(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {
        "model": "M",
        "messages": HELLO,
        "max_tokens": 200,
        "seed": 5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}},
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "stop"
    found = json.loads(whole.message.content)
    assert set(found) == {"city", "size"}
    assert found["size"] in ("small", "large")
    deltas = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(deltas) == whole.message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_cannot_be_compiled_is_named_and_others_go_on(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(
            model="M", messages=HELLO, stream=stream, extra_body={"structured_outputs": {"regex": "("}}
        )
    assert raised.value.body["param"] == "structured_outputs.regex"
    assert raised.value.body["code"] == "grammar_invalid"
    choice = {"structured_outputs": {"choice": ["left", "right"]}}
    answer = client.chat.completions.create(model="M", messages=HELLO, max_tokens=50, extra_body=choice)
    assert answer.choices[0].message.content in ("left", "right")


class Weather(BaseModel):
    """The weather somewhere."""

    town: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


def test_pydantic_models_are_filled_by_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "max_tokens": 120, "temperature": 0}
    whole = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message.parsed
    assert isinstance(whole, Weather)
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == whole
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_pydantic_functions_are_called_with_their_own_types(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "M", "messages": HELLO, "max_tokens": 200, "temperature": 0}
    tools = [openai.pydantic_function_tool(Weather)]
    answer = client.chat.completions.parse(**asked, tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
    free = client.chat.completions.create(**asked | {"max_tokens": 8}, tools=tools)  # strict, and free not to call
    assert free.choices[0].message.content is not None


def test_the_asynchronous_client_streams_many_at_once(server: ServerProcess) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        messages: list[Any] = [{"role": "user", "content": f"question {number}"}]
        asked: dict[str, Any] = {"model": "M", "messages": messages, "max_tokens": 12, "temperature": 0}
        stream = await client.chat.completions.create(**asked, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == text
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*[one(client, number) for number in range(8)])

    assert len(set(asyncio.run(all_of_them()))) > 1
