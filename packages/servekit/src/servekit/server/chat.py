"""``/v1/chat/completions``: its fields and what they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common_platform.errors import RequestError
from servekit.server import fields as f
from servekit.server.messages import check_messages, check_tools
from servekit.server.protocol import (
    Door,
    GenerationRequest,
    check_body,
    check_together,
    common_fields,
    sampling_params,
    stream_fields,
)
from servekit.server.structured import structured_output

OF_THE_SERVER = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)


def chat_fields(door: Door, variables: frozenset[str]) -> dict[str, f.Check]:
    """Args: variables: the names that the model's chat template reads."""
    limits, length = door.config.limits, door.facts.max_model_len
    return common_fields(door) | {
        "messages": check_messages(limits),
        "max_tokens": f.integer(1, length, "--max-model-len"),
        "max_completion_tokens": f.integer(1, length, "--max-model-len"),
        "logprobs": f.boolean,
        "top_logprobs": f.integer(0, limits.max_logprobs, "--max-logprobs"),
        "tools": check_tools(limits),
        "tool_choice": _tool_choice,
        "parallel_tool_calls": f.boolean,
        "add_generation_prompt": f.boolean,
        "chat_template": f.refused(
            "the model's own template", code="chat_template_refused", flag="--allow-request-chat-template"
        ),
        "chat_template_kwargs": _template_variables(variables),
        "modalities": f.listed(f.one_of("text"), 1, least=1),
    }


def read_chat(door: Door, body: dict[str, Any], checks: dict[str, f.Check]) -> ChatRequest:
    """The request in ``body``.

    Raises:
        RequestError: the first fault, in the order of the body.
    """
    checked = check_body(door, body, checks, "messages")
    name, max_tokens = _max_tokens(checked)
    check_together(door, checked, num_prompts=1, max_tokens=max_tokens, tokens_name=name)
    _check_tools_together(checked)
    spec, names = structured_output(checked, door.config.limits)
    return ChatRequest(
        **stream_fields(checked),
        params=sampling_params(checked, max_tokens=max_tokens, logprobs=_logprobs(checked), structured=spec),
        param_names=names | {"prompt": "messages", "max_tokens": name},
        messages=checked["messages"],
        add_generation_prompt=checked.get("add_generation_prompt", True),
        add_special_tokens=checked.get("add_special_tokens", False),
        template_variables=checked.get("chat_template_kwargs", {}),
    )


def _max_tokens(checked: Mapping[str, Any]) -> tuple[str, int | None]:
    old, new = checked.get("max_tokens"), checked.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise RequestError("max_completion_tokens", new, f"max_tokens={old}, or one of the two", code="conflict")
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)


def _logprobs(checked: Mapping[str, Any]) -> int | None:
    wanted, top = checked.get("logprobs", False), checked.get("top_logprobs")
    if top is not None and not wanted:
        raise RequestError("top_logprobs", top, "nothing without logprobs=true", code="conflict")
    return (top or 0) if wanted else None


def _tool_choice(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return value
    return f.one_of("none", "auto", "required")(value, path)


def _check_tools_together(checked: Mapping[str, Any]) -> None:
    tools, choice = checked.get("tools"), checked.get("tool_choice", "auto")
    if not tools and choice not in ("none", "auto"):
        shown = choice if isinstance(choice, str) else "a function"
        raise RequestError("tool_choice", shown, "none or auto without tools", code="conflict")
    if tools and choice != "none":
        raise f.unsupported("tools", f"{len(tools)} tools", "none yet, or tool_choice=none")


def _template_variables(variables: frozenset[str]) -> f.Check:
    allowed = variables - OF_THE_SERVER

    def check(value: Any, path: str) -> dict[str, Any]:
        for name in f.any_object(value, path):
            at = f"{path}.{name[:64]}"
            if name == "chat_template":
                limit, flag = "the model's own template", "--allow-request-chat-template"
                raise RequestError(at, "a template", limit, code="chat_template_refused", flag=flag)
            if name not in allowed:
                limit = f"what the template reads: {', '.join(sorted(allowed)) or 'nothing'}"[:200]
                raise RequestError(at, "an unknown field", limit, code="unknown_field")
        return dict(value)

    return check
