"""Tools as callers offer them, and what their choice means: a grammar, a parser, and what the template shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common_platform.errors import RequestError
from servekit.sampling.parameters import StructuredOutput
from servekit.server import fields as f
from servekit.server.call_schemas import ANY_OBJECT, Tool, list_of_calls
from servekit.server.limits import ServerLimits
from servekit.server.parsers.base import Parser
from servekit.server.parsers.constrained import NamedParser, RequiredParser
from servekit.server.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, Make, Pipeline
from servekit.server.strict_calls import strict_grammar
from servekit.server.strict_form import Calls
from servekit.server.structured import check_schema, check_text
from servekit.server.template import ChatModel


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's tools come to.

    ``shown`` is for the template; ``constraint`` forces calls; ``force`` is the function that the caller named;
    ``guide`` leaves the text free, and holds calls to the schemas of strict functions.
    """

    shown: Sequence[Tool] | None = None
    constraint: StructuredOutput | None = None
    guide: StructuredOutput | None = None
    force: str = ""
    parser: str = ""
    is_parallel: bool = True

    def pipeline(self, reasoning: str) -> Pipeline:
        """What reads one answer. Args: reasoning: the name of the model's parser, empty for none."""
        tools = self._tool_parser()
        if self.constraint is not None:
            return Pipeline(None, tools)
        if tools is not None and tools.reads_reasoning:
            return Pipeline(None, tools)
        return Pipeline(REASONING_PARSERS[reasoning]() if reasoning else None, tools)

    def _tool_parser(self) -> Parser | None:
        if self.force:
            return NamedParser(self.force)
        if self.constraint is not None:
            return RequiredParser()
        return TOOL_PARSERS[self.parser]() if self.parser else None


def needs_special_tokens(*names: str) -> bool:
    """Whether a parser of these names must see the special tokens of a text."""
    known: dict[str, Make] = TOOL_PARSERS | REASONING_PARSERS
    return any(known[name]().needs_special_tokens for name in names if name)


@f.described({"enum": ["none", "auto", "required"]})
def check_tool_choice(value: Any, path: str) -> str | dict[str, Any]:
    """A word, or the function that must be called."""
    if not isinstance(value, dict):
        return str(f.one_of("none", "auto", "required")(value, path))
    name: f.Check = lambda item, at: f.check_object(item, at, {"name": f.text(64)}, required=("name",))  # noqa: E731
    checks: dict[str, f.Check] = {"type": f.one_of("function"), "function": name}
    return f.check_object(value, path, checks, required=("type", "function"))


def tool_use(checked: Mapping[str, Any], model: ChatModel, limits: ServerLimits, *, is_structured: bool) -> ToolUse:
    """What the tools of a request mean.

    Args:
        is_structured: its text is constrained already.

    Raises:
        RequestError: tools, choice and the rest do not go together, or the model cannot have tools.
    """
    tools, choice = checked.get("tools"), checked.get("tool_choice", "auto")
    if not tools:
        if choice not in ("none", "auto"):
            shown = choice if isinstance(choice, str) else "a function"
            raise RequestError("tool_choice", shown, "none or auto without tools", code="conflict")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    if not model.shows_tools:
        raise f.unsupported("tools", f"{len(tools)} tools", "none: this model's chat template does not show them")
    is_parallel = checked.get("parallel_tool_calls", True)
    if choice == "auto":
        if not model.tool_parser:
            limit = "none, or tool_choice required: what this model writes for calls is not known"
            raise f.unsupported("tools", f"{len(tools)} tools", limit, flag="--tool-call-parser")
        if is_structured:  # where its text is bound to be JSON, the model has no way to call
            parser = "" if checked.get("response_format") is not None else model.tool_parser
            return ToolUse(tools, parser=parser, is_parallel=is_parallel)
        guide = _guide(tools, model, limits, is_parallel=is_parallel)
        return ToolUse(tools, guide=guide, parser=model.tool_parser, is_parallel=is_parallel)
    if is_structured:
        limit = "auto or none beside response_format or structured_outputs"
        raise RequestError("tool_choice", choice if isinstance(choice, str) else "a function", limit, code="conflict")
    if choice == "required":
        schema = list_of_calls(tools, is_parallel=is_parallel)
        check_schema(schema, "tools", limits)
        return ToolUse(tools, _constraint(schema), is_parallel=is_parallel)
    name = choice["function"]["name"]  # type: ignore[index]
    function = next((tool["function"] for tool in tools if tool["function"]["name"] == name), None)
    if function is None:
        known = ", ".join(tool["function"]["name"] for tool in tools)
        raise RequestError("tool_choice.function.name", name, f"one of {known}"[:200], code="out_of_range")
    return ToolUse(tools, _constraint(function.get("parameters") or ANY_OBJECT), force=name)


def _guide(
    tools: Sequence[Tool], model: ChatModel, limits: ServerLimits, *, is_parallel: bool
) -> StructuredOutput | None:
    """The grammar of free text with strict calls in it; None where no function is strict."""
    strict = next((index for index, tool in enumerate(tools) if tool["function"].get("strict")), None)
    if strict is None:
        return None
    calls = Calls(tools=tools, is_parallel=is_parallel, reasoning=model.reasoning_parser, special_ids=model.special_ids)
    text = strict_grammar(model.tool_parser, calls)
    if text is None:
        limit = "false with tool_choice auto: what this model writes for calls cannot be held to a schema"
        raise f.unsupported(f"tools[{strict}].function.strict", True, limit)
    check_text(text, "tools", limits)
    return StructuredOutput(lark=text)


def _constraint(schema: dict[str, Any]) -> StructuredOutput:
    return StructuredOutput(json=json.dumps(schema, ensure_ascii=False))
