"""The messages and tools of a chat."""

from __future__ import annotations

import json
import re
from typing import Any

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits
from servekit.server import fields as f
from servekit.server.images import IMAGE, check_image_part, check_num_images
from servekit.server.limits import ServerLimits
from servekit.server.other_media import AUDIO, VIDEO, check_audio_part, check_video_part
from servekit.server.structured import check_schema

ROLES = ("system", "developer", "user", "assistant", "tool")
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ANY_LENGTH = 2**31  # bounded by the body


def check_messages(limits: ServerLimits, media: MediaLimits) -> f.Check:
    """A list of messages in the form that chat templates read: content is one text."""

    said: dict[str, f.Check] = {"role": f.one_of(*ROLES[:-1]), "content": f.text(ANY_LENGTH), "name": f.text(256)}
    one = f.object_schema(said, "role", "content")

    @f.described({"type": "array", "items": one, "minItems": 1, "maxItems": limits.max_messages})
    def check(value: Any, path: str) -> list[dict[str, Any]]:
        check_num_images(value, path, media)
        messages = f.listed(
            lambda item, at: _message(item, at, limits, media), limits.max_messages, least=1, flag="--max-messages"
        )
        checked: list[dict[str, Any]] = messages(value, path)
        _check_tool_answers(checked, path)
        return checked

    return check


def _message(value: Any, path: str, limits: ServerLimits, media: MediaLimits) -> dict[str, Any]:
    checks: dict[str, f.Check] = {
        "role": f.one_of(*ROLES, code="unsupported_role"),
        "content": lambda content, at: _content(content, at, limits, media),
        "name": f.text(256),
        "refusal": f.text(ANY_LENGTH),
        "reasoning_content": f.text(ANY_LENGTH),
        "tool_calls": f.listed(_tool_call, limits.max_tools, flag="--max-tools"),
        "tool_call_id": f.text(256),
    }
    calls = isinstance(value, dict) and value.get("role") == "assistant" and bool(value.get("tool_calls"))
    required = ("role",) if calls else ("role", "content")
    message = f.check_object(value, path, checks, required=required)
    if message["role"] == "developer":
        message["role"] = "system"  # OpenAI's newer word for it; templates know the older
    message.setdefault("content", "")
    for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = _as_templates_read(call["function"]["arguments"])
    return message


def _content(value: Any, path: str, limits: ServerLimits, media: MediaLimits) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise f.wrong_type(path, value, "string or array")
    part: f.Check = lambda item, at: _part(item, at, media)  # noqa: E731
    return "".join(f.listed(part, limits.max_parts, least=1, flag="--max-parts")(value, path))


def _part(value: Any, path: str, media: MediaLimits) -> str:
    checks: dict[str, f.Check] = {"type": f.one_of("text"), "text": f.text(ANY_LENGTH)}
    if isinstance(value, dict) and value.get("type") == IMAGE:
        check_image_part(value, path, media)
    if isinstance(value, dict) and value.get("type") == AUDIO:
        check_audio_part(value, path, media)
    if isinstance(value, dict) and value.get("type") == VIDEO:
        check_video_part(value, path, media)
    if isinstance(value, dict) and value.get("type") not in (None, "text"):
        checks["type"](value["type"], f"{path}.type")
    text: str = f.check_object(value, path, checks, required=("type", "text"))["text"]
    return text


def _tool_call(value: Any, path: str) -> dict[str, Any]:
    function: f.Check = lambda item, at: f.check_object(  # noqa: E731
        item, at, {"name": _function_name, "arguments": f.text(ANY_LENGTH)}, required=("name", "arguments")
    )
    checks: dict[str, f.Check] = {"id": f.text(256), "type": f.one_of("function"), "function": function}
    return f.check_object(value, path, checks, required=("id", "function"))


def _as_templates_read(arguments: str) -> Any:
    """An object, as templates write it; what a model wrote wrongly stays the text it is."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _check_tool_answers(messages: list[dict[str, Any]], path: str) -> None:
    """A tool's answer follows the assistant's call of it."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message.get("tool_call_id") not in called:
            raise RequestError(f"{path}[{index}]", "a tool's answer", "one to a tool call before it", code="conflict")


def check_tools(limits: ServerLimits) -> f.Check:
    function = f.object_schema({"name": _function_name, "description": f.text(1024)}, "name")
    form = {"type": "object", "properties": {"type": {"const": "function"}, "function": function}}
    one = f.described(form | {"required": ["type", "function"]})
    return f.listed(one(lambda tool, at: _tool(tool, at, limits)), limits.max_tools, flag="--max-tools")


def _tool(value: Any, path: str, limits: ServerLimits) -> dict[str, Any]:
    checks: dict[str, f.Check] = {
        "type": f.one_of("function"),
        "function": lambda function, at: _function(function, at, limits),
    }
    return f.check_object(value, path, checks, required=("type", "function"))


def _function(value: Any, path: str, limits: ServerLimits) -> dict[str, Any]:
    def parameters(schema: Any, at: str) -> dict[str, Any]:
        check_schema(f.any_object(schema, at), at, limits)
        return schema

    checks: dict[str, f.Check] = {
        "name": _function_name,
        "description": f.text(ANY_LENGTH),
        "parameters": parameters,
        "strict": f.boolean,
    }
    return f.check_object(value, path, checks, required=("name",))


@f.described({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"})
def _function_name(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise f.wrong_type(path, value, "string")
    if not FUNCTION_NAME.fullmatch(value):
        raise RequestError(path, value, "[A-Za-z0-9_-]{1,64}", code="out_of_range")
    return value
