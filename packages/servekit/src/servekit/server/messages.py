"""The messages of a chat, checked one by one before the model's template sees them."""

from __future__ import annotations

from typing import Any

from common_platform.errors import RequestError
from servekit.engine.tokenizer import Tokenizer
from servekit.server.json_body import json_name
from servekit.server.limits import ServerLimits
from servekit.server.protocol import ChatRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt", "tokenize", "documents")


def render(request: ChatRequest, tokenizer: Tokenizer, limits: ServerLimits) -> str:
    """The prompt of a chat.

    Raises:
        RequestError: naming the first message, part or template variable that cannot be used.
    """
    if request.tools or request.tool_choice not in (None, "none", "auto"):
        _refuse_tools(request, limits)
    if request.chat_template is not None:
        raise RequestError("chat_template", "a template", "the model's own", code="chat_template_refused")
    variables = _variables(request.chat_template_kwargs or {})
    messages = checked_messages(request.messages, limits)
    generate = True if request.add_generation_prompt is None else request.add_generation_prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=generate, **variables)


def _refuse_tools(request: ChatRequest, limits: ServerLimits) -> None:
    if not request.tools:
        raise RequestError("tool_choice", request.tool_choice, "none, or tools to choose from", code="conflict")
    if len(request.tools) > limits.max_tools:
        limit = f"at most {limits.max_tools} tools"
        raise RequestError("tools", len(request.tools), limit, code="out_of_range", flag="--max-tools")
    raise RequestError("tools", f"{len(request.tools)} tools", "none in this version", code="unsupported")


def _variables(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name == "chat_template":
            param = "chat_template_kwargs.chat_template"
            raise RequestError(param, "a template", "the model's own", code="chat_template_refused")
        if name in RESERVED_VARIABLES or not name.isidentifier():
            param = f"chat_template_kwargs.{name[:64]}"
            raise RequestError(param, name, "variables of the model's template", code="unknown_field")
    return given


def checked_messages(messages: list[dict[str, Any]], limits: ServerLimits) -> list[dict[str, Any]]:
    """Copies in which every content is a text."""
    if not messages:
        raise RequestError("messages", "an empty list", "at least one message", code="out_of_range")
    if len(messages) > limits.max_messages:
        limit = f"at most {limits.max_messages} messages"
        raise RequestError("messages", len(messages), limit, code="out_of_range", flag="--max-messages")
    return [_message(message, f"messages[{index}]", limits) for index, message in enumerate(messages)]


def _message(message: dict[str, Any], at: str, limits: ServerLimits) -> dict[str, Any]:
    role = message.get("role")
    if role is None:
        raise RequestError(f"{at}.role", "nothing", f"one of {ROLES}", code="missing_field")
    if role not in ROLES:
        raise RequestError(f"{at}.role", role, f"one of {ROLES}", code="unsupported")
    if role == "tool":
        raise RequestError(at, "a tool's result", "one after the call that it answers", code="conflict")
    if "content" not in message:
        raise RequestError(f"{at}.content", "nothing", "a text", code="missing_field")
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise RequestError(f"{at}.name", json_name(name), "a string", code="invalid_type")
    checked = {"role": "system" if role == "developer" else role}
    checked["content"] = _content(message["content"], f"{at}.content", limits)
    return checked | ({"name": name} if name else {})


def _content(content: Any, at: str, limits: ServerLimits) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(at, json_name(content), "a string or a list of parts", code="invalid_type")
    if len(content) > limits.max_parts:
        limit = f"at most {limits.max_parts} parts"
        raise RequestError(at, len(content), limit, code="out_of_range", flag="--max-parts")
    return "".join(_part(part, f"{at}[{index}]") for index, part in enumerate(content))


def _part(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(at, json_name(part), "an object", code="invalid_type")
    if part.get("type") != "text":
        raise RequestError(f"{at}.type", part.get("type"), "text, for this model", code="unsupported")
    if "text" not in part:
        raise RequestError(f"{at}.text", "nothing", "a text", code="missing_field")
    if not isinstance(part["text"], str):
        raise RequestError(f"{at}.text", json_name(part["text"]), "a string", code="invalid_type")
    return part["text"]
