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
from servekit.server.template import ChatModel
from servekit.server.templates import ChatPrompt
from servekit.server.tools import ToolUse, check_tool_choice, needs_special_tokens, tool_use

OF_THE_SERVER = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """``hides_end_token``: special tokens are in the text for the parsers, so the one that ends it is too."""

    prompt: ChatPrompt
    tools: ToolUse = field(default_factory=ToolUse)
    reasoning_parser: str = ""
    hides_end_token: bool = False
    add_special_tokens: bool = False


def chat_fields(door: Door, model: ChatModel) -> dict[str, f.Check]:
    limits, length = door.config.limits, door.facts.max_model_len
    return common_fields(door) | {
        "messages": check_messages(limits, door.config.media),
        "max_tokens": f.integer(1, length, "--max-model-len"),
        "max_completion_tokens": f.integer(1, length, "--max-model-len"),
        "logprobs": f.boolean,
        "top_logprobs": f.integer(0, limits.max_logprobs, "--max-logprobs"),
        "tools": check_tools(limits),
        "tool_choice": check_tool_choice,
        "parallel_tool_calls": f.boolean,
        "add_generation_prompt": f.boolean,
        "continue_final_message": f.boolean,
        "chat_template": f.text(limits.max_template_chars, min_chars=1, flag="--max-template-chars")
        if door.config.allow_request_chat_template
        else _no_template,
        "chat_template_kwargs": _template_variables(door, model.variables),
        "reasoning_effort": _reasoning_effort(model.variables),
        "modalities": f.listed(f.one_of("text"), 1, least=1),
    }


def read_chat(door: Door, model: ChatModel, body: dict[str, Any], checks: dict[str, f.Check]) -> ChatRequest:
    """The request in ``body``.

    Raises:
        RequestError: the first fault, in the order of the body.
    """
    checked = check_body(door, body, checks, "messages")
    name, max_tokens = _max_tokens(checked)
    check_together(door, checked, num_prompts=1, max_tokens=max_tokens, tokens_name=name)
    spec, names = structured_output(checked, door.config.limits)
    tools = tool_use(checked, model, door.config.limits, is_structured=spec is not None)
    if tools.constraint is not None:
        spec, names = tools.constraint, {"json": "tools", "structured_outputs": "tool_choice"}
    elif tools.guide is not None:
        spec, names = tools.guide, {"lark": "tools", "structured_outputs": "tools"}
    is_json = tools.constraint is not None or checked.get("response_format") is not None
    reasoning = "" if is_json else model.reasoning_parser  # a grammar leaves no room to think
    hides = "skip_special_tokens" not in checked and needs_special_tokens(tools.parser, reasoning)
    if hides:
        checked["skip_special_tokens"] = False
    return ChatRequest(
        **stream_fields(checked),
        params=sampling_params(checked, max_tokens=max_tokens, logprobs=_logprobs(checked), structured=spec),
        param_names=names | {"prompt": "messages", "max_tokens": name},
        prompt=_prompt(checked, tools),
        tools=tools,
        reasoning_parser=reasoning,
        hides_end_token=hides,
        add_special_tokens=checked.get("add_special_tokens", False),
    )


def _prompt(checked: Mapping[str, Any], tools: ToolUse) -> ChatPrompt:
    goes_on = checked.get("continue_final_message", False)
    if goes_on and checked.get("add_generation_prompt"):
        limit = "false with continue_final_message"
        raise RequestError("add_generation_prompt", True, limit, code="conflict")
    variables = dict(checked.get("chat_template_kwargs", {}))
    if "reasoning_effort" in checked:
        variables.setdefault("reasoning_effort", checked["reasoning_effort"])
    return ChatPrompt(
        messages=checked["messages"],
        tools=tools.shown,
        add_generation_prompt=checked.get("add_generation_prompt", not goes_on),
        continue_final_message=goes_on,
        variables=variables,
        source=checked.get("chat_template"),
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


def _no_template(value: Any, path: str) -> str:
    limit, flag = "the model's own template", "--allow-request-chat-template"
    raise RequestError(path, "a template", limit, code="chat_template_refused", flag=flag)


def _reasoning_effort(variables: frozenset[str]) -> f.Check:
    if "reasoning_effort" in variables:
        return f.one_of("none", "minimal", "low", "medium", "high", "xhigh")
    return f.refused("nothing: this model's chat template does not read it")


def _template_variables(door: Door, variables: frozenset[str]) -> f.Check:
    """A caller's own template may read what it likes; the model's reads what it reads."""
    allowed = variables - OF_THE_SERVER
    is_open = door.config.allow_request_chat_template

    def check(value: Any, path: str) -> dict[str, Any]:
        for name in f.any_object(value, path):
            at = f"{path}.{name[:64]}"
            if name == "chat_template":
                _no_template(name, at)
            if name not in allowed and (not is_open or name in OF_THE_SERVER):
                limit = f"what the template reads: {', '.join(sorted(allowed)) or 'nothing'}"[:200]
                raise RequestError(at, "an unknown field", limit, code="unknown_field")
        return dict(value)

    return check
