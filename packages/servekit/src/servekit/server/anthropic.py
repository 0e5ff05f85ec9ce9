"""``/v1/messages``: Anthropic's form of a chat, and the chat that it means."""

from __future__ import annotations

import json
from typing import Any

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits
from servekit.server import fields as f
from servekit.server.chat import ChatRequest, read_chat
from servekit.server.images import cannot_see, check_base64, check_image, check_num_images
from servekit.server.messages import ANY_LENGTH
from servekit.server.protocol import Door
from servekit.server.template import ChatModel
from servekit.server.translation import Translation, taken

Json = dict[str, Any]
NAMES = {"max_tokens": "max_tokens", "stop": "stop_sequences", "user": "metadata.user_id"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
THINKING = "enable_thinking"  # the variable that templates of models which can do both read


def anthropic_fields(door: Door, *, counts: bool = False) -> dict[str, f.Check]:
    """Args: counts: for ``/v1/messages/count_tokens``."""
    limits, media = door.config.limits, door.config.media
    said = f.object_schema({"role": f.one_of("user", "assistant"), "content": f.text(ANY_LENGTH)}, "role", "content")
    message: f.Check = f.described(said)(lambda value, path: _message(value, path, limits.max_parts, media))
    checks: dict[str, f.Check] = {
        "model": f.any_value,
        "messages": f.listed(message, limits.max_messages, least=1, flag="--max-messages"),
        "system": f.described({"type": "string"})(lambda value, path: _text(value, path, limits.max_parts)),
        "tools": f.listed(_tool, limits.max_tools, flag="--max-tools"),
        "tool_choice": _tool_choice,
        "thinking": _thinking,
    }
    if counts:
        return checks
    return checks | {
        "max_tokens": f.any_value,
        "stop_sequences": f.any_value,
        "temperature": f.any_value,
        "top_p": f.any_value,
        "top_k": f.any_value,
        "stream": f.boolean,
        "metadata": lambda value, path: f.check_object(value, path, {"user_id": f.text(256)}),
        "service_tier": f.one_of("auto", "standard_only"),
    }


def read_anthropic(
    door: Door, model: ChatModel, body: Json, checks: dict[str, f.Check], chat_checks: dict[str, f.Check]
) -> ChatRequest:
    """The request in ``body``.

    Raises:
        RequestError: the first fault, by the caller's own path to it.
    """
    required = ("model", "messages", *(["max_tokens"] if "max_tokens" in checks else []))
    checked = f.check_object(body, "", checks, required=required, ignore_unknown=door.config.ignore_unknown_fields)
    chat = _as_chat(checked, model)
    try:
        return chat.renamed(read_chat(door, model, chat.body, chat_checks))
    except RequestError as error:
        raise chat.rename(error) from error


def _as_chat(checked: Json, model: ChatModel) -> Translation:
    chat = Translation(taken(checked, "model", "max_tokens", "temperature", "top_p", "top_k", "stream"), dict(NAMES))
    if "stop_sequences" in checked:
        chat.body["stop"] = checked["stop_sequences"]
    if "user_id" in checked.get("metadata", {}):
        chat.body["user"] = checked["metadata"]["user_id"]
    if "thinking" in checked and THINKING in model.variables:
        chat.body["chat_template_kwargs"] = {THINKING: checked["thinking"]["type"] != "disabled"}
    _offer_tools(chat, checked)
    if checked.get("system"):
        chat.say("system", {"role": "system", "content": checked["system"]})
    for index, message in enumerate(checked["messages"]):
        _say(chat, f"messages[{index}]", message)
    chat.body["messages"] = chat.messages
    if checked["messages"][-1]["role"] == "assistant":  # a beginning that the model goes on with
        chat.body["continue_final_message"] = True
    return chat


def _offer_tools(chat: Translation, checked: Json) -> None:
    if "tools" in checked:
        chat.body["tools"] = []
        for index, tool in enumerate(checked["tools"]):
            function = {"name": tool["name"], "parameters": tool["input_schema"]} | taken(tool, "description", "strict")
            chat.body["tools"].append({"type": "function", "function": function})
            chat.names[f"tools[{index}].function.parameters"] = f"tools[{index}].input_schema"
            chat.names[f"tools[{index}].function"] = f"tools[{index}]"
    choice = checked.get("tool_choice")
    if choice is None:
        return
    if choice["type"] == "tool":
        chat.body["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        chat.names["tool_choice.function.name"] = "tool_choice.name"
    else:
        chat.body["tool_choice"] = CHOICES[choice["type"]]
    if choice.get("disable_parallel_tool_use"):
        chat.body["parallel_tool_calls"] = False


def _say(chat: Translation, path: str, message: Json) -> None:
    if isinstance(message["content"], str):
        chat.say(path, message)
        return
    blocks = message["content"]
    for block in blocks:
        if block["type"] == "tool_result":
            chat.say(path, {"role": "tool", "tool_call_id": block["tool_use_id"], "content": block.get("content", "")})
    made: Json = {"role": message["role"]}
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [_call(block) for block in blocks if block["type"] == "tool_use"]
    if texts or not (calls or (len(chat.messages) and chat.paths[-1] == path)):
        made["content"] = "".join(texts)
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    if len(made) > 1:
        chat.say(path, made)


def _call(block: Json) -> Json:
    function = {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)}
    return {"id": block["id"], "type": "function", "function": function}


def _message(value: Any, path: str, max_parts: int, media: MediaLimits) -> Json:
    role = value.get("role") if isinstance(value, dict) else None

    def content(item: Any, at: str) -> Any:
        if isinstance(item, str):
            return item
        if not isinstance(item, list):
            raise f.wrong_type(at, item, "string or array")
        check_num_images([value], at, media)
        block: f.Check = lambda one, where: _block(one, where, role, max_parts, media)  # noqa: E731
        return f.listed(block, max_parts, flag="--max-parts")(item, at)

    checks: dict[str, f.Check] = {"role": f.one_of("user", "assistant", code="unsupported_role"), "content": content}
    return f.check_object(value, path, checks, required=("role", "content"))


def _block(value: Any, path: str, role: Any, max_parts: int, media: MediaLimits) -> Json:
    if f.any_object(value, path).get("type") == "image":
        _refuse_image(value, path, media)
    forms: dict[str, dict[str, f.Check]] = {"text": {"text": f.text(ANY_LENGTH), "citations": f.any_value}}
    if role == "user":
        result: f.Check = lambda item, at: _text(item, at, max_parts)  # noqa: E731
        forms["tool_result"] = {"tool_use_id": f.text(256), "content": result, "is_error": f.boolean}
    else:
        forms["tool_use"] = {"id": f.text(256), "name": f.text(64), "input": f.any_object, "caller": f.any_value}
        forms["thinking"] = {"thinking": f.text(ANY_LENGTH), "signature": f.text(ANY_LENGTH)}
        forms["redacted_thinking"] = {"data": f.text(ANY_LENGTH)}
    kind: str = f.one_of(*forms)(value.get("type"), f"{path}.type")
    optional = ("citations", "content", "is_error", "caller", "signature")
    required = ("type", *(name for name in forms[kind] if name not in optional))
    checks = {"type": f.text(64), "cache_control": f.any_value} | forms[kind]
    return f.check_object(value, path, checks, required=required)


def _refuse_image(value: Json, path: str, media: MediaLimits) -> None:
    at = f"{path}.source"
    kind = f.any_object(value.get("source"), at).get("type")
    fields: dict[str, f.Check] = {
        "type": f.one_of("base64", "url"),
        "media_type": f.text(64),
        "data": f.text(ANY_LENGTH),
    }
    given = f.check_object(value["source"], at, fields | {"url": f.text(ANY_LENGTH)}, required=("type",))
    if kind == "url":
        check_image(given.get("url", ""), f"{at}.url", media)
    else:
        check_base64(given.get("data", ""), f"{at}.data", media)
    raise cannot_see(path)


def _text(value: Any, path: str, max_parts: int) -> str:
    """A text, or blocks of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise f.wrong_type(path, value, "string or array")
    checks: dict[str, f.Check] = {"type": f.one_of("text"), "text": f.text(ANY_LENGTH)}
    checks |= {"cache_control": f.any_value, "citations": f.any_value}

    def part(item: Any, at: str) -> str:
        f.one_of("text")(f.any_object(item, at).get("type"), f"{at}.type")
        return str(f.check_object(item, at, checks, required=("text",))["text"])

    return "".join(f.listed(part, max_parts, flag="--max-parts")(value, path))


def _tool(value: Any, path: str) -> Json:
    checks: dict[str, f.Check] = {
        "type": f.one_of("custom"),
        "name": f.text(64),
        "description": f.text(ANY_LENGTH),
        "input_schema": f.any_object,
        "cache_control": f.any_value,
        "strict": f.boolean,
    }
    if isinstance(value, dict) and value.get("type") not in (None, "custom"):
        checks["type"](value["type"], f"{path}.type")
    return f.check_object(value, path, checks, required=("name", "input_schema"))


def _tool_choice(value: Any, path: str) -> Json:
    checks: dict[str, f.Check] = {"type": f.one_of(*CHOICES, "tool"), "disable_parallel_tool_use": f.boolean}
    is_named = isinstance(value, dict) and value.get("type") == "tool"
    if is_named:
        checks["name"] = f.text(64)
    return f.check_object(value, path, checks, required=("type", "name") if is_named else ("type",))


def _thinking(value: Any, path: str) -> Json:
    checks: dict[str, f.Check] = {"type": f.one_of("enabled", "disabled", "adaptive"), "display": f.text(32)}
    checks["budget_tokens"] = f.integer(1, 2**31)
    return f.check_object(value, path, checks, required=("type",))
