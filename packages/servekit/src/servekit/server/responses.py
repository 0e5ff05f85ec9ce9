"""``/v1/responses``: its fields, and the chat that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits
from servekit.server import fields as f
from servekit.server.chat import ChatRequest, read_chat
from servekit.server.images import IMAGE, INPUT_IMAGE, cannot_see, check_image, check_num_images
from servekit.server.messages import ANY_LENGTH
from servekit.server.protocol import Door
from servekit.server.template import ChatModel
from servekit.server.translation import Translation, join_assistant, taken

Json = dict[str, Any]
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function": "tool_choice",
}
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRequest:
    """``about`` is what the answer repeats of the request; ``said`` the messages, for a response that goes on."""

    chat: ChatRequest
    stream: bool
    store: bool
    background: bool
    about: Json
    said: list[Json]


def response_fields(door: Door) -> dict[str, f.Check]:
    limits = door.config.limits
    media = door.config.media
    item: f.Check = lambda value, path: _item(value, path, limits.max_parts, media)  # noqa: E731
    items = f.listed(item, limits.max_messages, least=1, flag="--max-messages")
    same = dict.fromkeys(("model", "temperature", "top_p", "parallel_tool_calls", "user", "metadata"), f.any_value)
    same |= dict.fromkeys(("top_logprobs", "service_tier", "safety_identifier", "prompt_cache_key"), f.any_value)
    return same | {
        "input": f.described({"type": "string"})(
            lambda value, path: value if isinstance(value, str) else _items(value, path, items, media)
        ),
        "instructions": f.text(ANY_LENGTH),
        "max_output_tokens": f.any_value,
        "previous_response_id": f.text(128),
        "stream": f.boolean,
        "stream_options": f.any_object,
        "store": f.boolean,
        "background": f.boolean,
        "truncation": f.one_of("disabled"),
        "include": f.listed(f.one_of("message.output_text.logprobs", "reasoning.encrypted_content"), 16),
        "reasoning": _reasoning,
        "text": _text_format,
        "tools": f.listed(_tool, limits.max_tools, flag="--max-tools"),
        "tool_choice": f.any_value,
        "cache_salt": f.any_value,
        "priority": f.any_value,
        "seed": f.any_value,
        "structured_outputs": f.any_value,
    }


def read_response(
    door: Door,
    model: ChatModel,
    body: Json,
    checks: dict[str, f.Check],
    chat_checks: dict[str, f.Check],
    said: list[Json],
) -> ResponseRequest:
    """The request in ``body``.

    Args:
        said: the messages of the response that it goes on from.

    Raises:
        RequestError: the first fault, by the caller's own path to it.
    """
    checked = f.check_object(
        body, "", checks, required=("model", "input"), ignore_unknown=door.config.ignore_unknown_fields
    )
    if checked.get("background") and not checked.get("store", True):
        raise RequestError("store", False, "true with background", code="conflict")
    chat = _as_chat(checked, said)
    try:
        asked = chat.renamed(read_chat(door, model, chat.body, chat_checks))
    except RequestError as error:
        raise chat.rename(error) from error
    return ResponseRequest(
        chat=asked,
        stream=checked.get("stream", False),
        store=checked.get("store", True),
        background=checked.get("background", False),
        about=_about(checked),
        said=[message for message, path in zip(chat.messages, chat.paths, strict=True) if path != "instructions"],
    )


def _about(checked: Json) -> Json:
    return {
        "model": checked["model"],
        "instructions": checked.get("instructions"),
        "max_output_tokens": checked.get("max_output_tokens"),
        "metadata": checked.get("metadata", {}),
        "parallel_tool_calls": checked.get("parallel_tool_calls", True),
        "previous_response_id": checked.get("previous_response_id"),
        "reasoning": checked.get("reasoning"),
        "temperature": checked.get("temperature", 1.0),
        "text": checked.get("text") or {"format": {"type": "text"}},
        "tool_choice": checked.get("tool_choice", "auto"),
        "tools": checked.get("tools", []),
        "top_p": checked.get("top_p", 1.0),
        "truncation": "disabled",
        "background": checked.get("background", False),
        "store": checked.get("store", True),
        "user": checked.get("user"),
    }


def _as_chat(checked: Json, said: list[Json]) -> Translation:
    same = ("model", "temperature", "top_p", "parallel_tool_calls", "user", "metadata", "top_logprobs", "service_tier")
    more = ("safety_identifier", "prompt_cache_key", "cache_salt", "priority", "seed", "structured_outputs")
    chat = Translation(taken(checked, *same, *more), NAMES)
    if "max_output_tokens" in checked:
        chat.body["max_completion_tokens"] = checked["max_output_tokens"]
    if "top_logprobs" in checked or "message.output_text.logprobs" in checked.get("include", ()):
        chat.body["logprobs"] = True
    if checked.get("reasoning", {}).get("effort") is not None:
        chat.body["reasoning_effort"] = checked["reasoning"]["effort"]
    form = checked.get("text", {}).get("format", {"type": "text"})
    if form["type"] == "json_schema":
        chat.body["response_format"] = {
            "type": "json_schema",
            "json_schema": {name: value for name, value in form.items() if name != "type"},
        }
    elif form["type"] != "text":
        chat.body["response_format"] = form
    _offer_tools(chat, checked)
    if "instructions" in checked:
        chat.say("instructions", {"role": "system", "content": checked["instructions"]})
    for message in said:
        chat.say("previous_response_id", message)
    if isinstance(checked["input"], str):
        chat.say("input", {"role": "user", "content": checked["input"]})
    else:
        for index, item in enumerate(checked["input"]):
            _say(chat, f"input[{index}]", item)
    chat.body["messages"] = chat.messages
    return chat


def _offer_tools(chat: Translation, checked: Json) -> None:
    if "tools" in checked:
        functions = [{name: value for name, value in tool.items() if name != "type"} for tool in checked["tools"]]
        chat.body["tools"] = [{"type": "function", "function": function} for function in functions]
        for index in range(len(functions)):
            chat.names[f"tools[{index}].function"] = f"tools[{index}]"
    choice = checked.get("tool_choice")
    if isinstance(choice, dict):
        name = {key: value for key, value in choice.items() if key != "type"}
        chat.body["tool_choice"] = {"type": choice.get("type"), "function": name}
    elif choice is not None:
        chat.body["tool_choice"] = choice


def _say(chat: Translation, path: str, item: Json) -> None:
    kind = item.get("type", "message")
    if kind == "function_call_output":
        chat.say(path, {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    elif kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        join_assistant(chat, path, {"tool_calls": [call]})
    elif kind == "reasoning":
        if item.get("content"):
            join_assistant(chat, path, {"reasoning_content": item["content"]})
    elif item["role"] == "assistant":
        join_assistant(chat, path, {"content": item["content"]})
    else:
        chat.say(path, {"role": item["role"], "content": item["content"]})


def _items(value: Any, path: str, items: f.Check, media: MediaLimits) -> Any:
    check_num_images(value, path, media)
    return items(value, path)


def _item(value: Any, path: str, max_parts: int, media: MediaLimits) -> Json:
    kind = f.any_object(value, path).get("type", "message")
    text = lambda item, at: _joined(item, at, max_parts, media)  # noqa: E731
    about: dict[str, f.Check] = {"type": f.text(64), "id": f.text(128), "status": f.text(64)}
    forms: dict[str, tuple[dict[str, f.Check], tuple[str, ...]]] = {
        "message": (
            {"role": f.one_of("user", "assistant", "system", "developer", code="unsupported_role"), "content": text},
            ("role", "content"),
        ),
        "function_call": (
            {"call_id": f.text(256), "name": f.text(64), "arguments": f.text(ANY_LENGTH)},
            ("call_id", "name", "arguments"),
        ),
        "function_call_output": ({"call_id": f.text(256), "output": text}, ("call_id", "output")),
        "reasoning": ({"summary": f.any_value, "content": text, "encrypted_content": f.any_value}, ()),
    }
    f.one_of(*forms)(kind, f"{path}.type")
    checks, required = forms[kind]
    return f.check_object(value, path, about | checks, required=required)


def _joined(value: Any, path: str, max_parts: int, media: MediaLimits) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise f.wrong_type(path, value, "string or array")
    part: f.Check = lambda item, at: _part(item, at, media)  # noqa: E731
    return "".join(f.listed(part, max_parts, flag="--max-parts")(value, path))


def _part(value: Any, path: str, media: MediaLimits) -> str:
    kind = f.any_object(value, path).get("type")
    if kind == INPUT_IMAGE and isinstance(value.get(IMAGE), str):
        check_image(value[IMAGE], f"{path}.{IMAGE}", media)
        raise cannot_see(path)
    f.one_of(*TEXT_PARTS)(kind, f"{path}.type")
    name = "refusal" if kind == "refusal" else "text"
    checks: dict[str, f.Check] = {name: f.text(ANY_LENGTH), "type": f.text(64)}
    checks |= {"annotations": f.any_value, "logprobs": f.any_value}
    text: str = f.check_object(value, path, checks, required=(name,))[name]
    return text


def _reasoning(value: Any, path: str) -> Json:
    checks: dict[str, f.Check] = {"effort": f.text(32), "summary": f.text(32), "generate_summary": f.text(32)}
    return f.check_object(value, path, checks)


def _text_format(value: Any, path: str) -> Json:
    return f.check_object(value, path, {"format": _format, "verbosity": f.one_of("low", "medium", "high")})


def _format(value: Any, path: str) -> Json:
    checks: dict[str, f.Check] = {"type": f.one_of("text", "json_object", "json_schema")}
    if isinstance(value, dict) and value.get("type") == "json_schema":
        checks |= {"name": f.any_value, "schema": f.any_value, "strict": f.any_value, "description": f.any_value}
    return f.check_object(value, path, checks, required=("type",))


def _tool(value: Any, path: str) -> Json:
    checks: dict[str, f.Check] = {"type": f.one_of("function")}
    if isinstance(value, dict) and value.get("type") == "function":
        checks |= dict.fromkeys(("name", "description", "parameters", "strict"), f.any_value)
    return f.check_object(value, path, checks, required=("type",))
