"""JSON schemas of calls: one of the functions by its name, with arguments of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common_platform.errors import RequestError

DEFINITIONS = ("$defs", "definitions")
ANY_OBJECT: dict[str, Any] = {"type": "object"}
Tool = dict[str, Any]


def parameters_of(tools: Sequence[Tool], index: int, *, strict_only: bool = False) -> dict[str, Any]:
    """Of the function at ``index``. Args: strict_only: any object for a function that is not ``strict``."""
    function = tools[index]["function"]
    if strict_only and not function.get("strict"):
        return ANY_OBJECT
    return function.get("parameters") or ANY_OBJECT


def any_call(tools: Sequence[Tool], key: str, *, strict_only: bool = False) -> dict[str, Any]:
    """An object of ``name`` and ``key``; definitions that functions refer to move to the top.

    Raises:
        RequestError: two functions define one name in two ways.
    """
    definitions: dict[str, dict[str, Any]] = {name: {} for name in DEFINITIONS}
    calls = []
    for index, tool in enumerate(tools):
        parameters = dict(parameters_of(tools, index, strict_only=strict_only))
        for name in DEFINITIONS:
            _move(parameters.pop(name, {}), definitions[name], f"tools[{index}].function.parameters.{name}")
        properties = {"name": {"const": tool["function"]["name"]}, key: parameters}
        about = {"type": "object", "properties": properties, "required": ["name", key]}
        calls.append(about | {"additionalProperties": False})
    return {"anyOf": calls} | {name: found for name, found in definitions.items() if found}


def list_of_calls(tools: Sequence[Tool], *, is_parallel: bool) -> dict[str, Any]:
    """A list of one call or more."""
    call = any_call(tools, "parameters")
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": call.pop("anyOf")}}
    if not is_parallel:
        schema["maxItems"] = 1
    return schema | call


def _move(found: Any, into: dict[str, Any], path: str) -> None:
    for name, schema in found.items() if isinstance(found, Mapping) else ():
        if into.setdefault(name, schema) != schema:
            raise RequestError(f"{path}.{name}"[:128], "two schemas of one name", "one", code="conflict")
