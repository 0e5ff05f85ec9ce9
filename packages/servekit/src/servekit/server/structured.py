"""Structured output as callers ask for it: OpenAI's ``response_format`` or vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common_platform.errors import RequestError
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.limits import check_limits
from servekit.server import fields as f
from servekit.server.limits import ServerLimits

SCHEMA = "response_format.json_schema.schema"
Names = dict[str, str]  # the engine's name of a field -> the caller's


def structured_output(checked: Mapping[str, Any], limits: ServerLimits) -> tuple[StructuredOutput | None, Names]:
    """The constraint asked for, refused here where reading it is enough to refuse it.

    Raises:
        RequestError: ``param`` is the caller's path to the fault.
    """
    by_format, direct = checked.get("response_format"), checked.get("structured_outputs")
    if by_format is not None and direct is not None:
        raise RequestError("structured_outputs", "an object", "nothing beside response_format", code="conflict")
    if by_format is not None:
        names = {"json": SCHEMA, "structured_outputs": "response_format"}
        spec = _of_response_format(by_format)
    elif direct is not None:
        names = {kind: f"structured_outputs.{kind}" for kind in ("json", "regex", "choice", "grammar")}
        spec = _of_structured_outputs(direct, limits)
    else:
        return None, {}
    if spec is not None:
        _check(spec, limits, names)
    return spec, names


def _check(spec: StructuredOutput, limits: ServerLimits, names: Names) -> None:
    try:
        check_limits(spec, limits.grammar())
    except RequestError as error:
        raise renamed(error, names) from error


def check_schema(schema: dict[str, Any], path: str, limits: ServerLimits) -> None:
    """Raise RequestError, with a path below ``path``, for a JSON schema that could not be compiled."""
    _check(StructuredOutput(json=_as_text(schema)), limits, {"json": path})


def check_text(lark: str, path: str, limits: ServerLimits) -> None:
    """Raise RequestError for a grammar of the server's own that is too large."""
    _check(StructuredOutput(lark=lark), limits, {"lark": path})


def _of_response_format(value: dict[str, Any]) -> StructuredOutput | None:
    path = "response_format"
    kind = value.get("type")
    checks: dict[str, f.Check] = {"type": f.one_of("text", "json_object", "json_schema")}
    if kind == "json_schema":
        checks["json_schema"] = _json_schema
    given = f.check_object(value, path, checks, required=tuple(checks))
    if given["type"] == "text":
        return None
    if given["type"] == "json_object":
        return StructuredOutput(json_object=True)
    return StructuredOutput(json=_as_text(given["json_schema"]["schema"]))


def _json_schema(value: Any, path: str) -> dict[str, Any]:
    checks: dict[str, f.Check] = {
        "name": f.text(64, min_chars=1),
        "description": f.text(4096),
        "strict": f.boolean,
        "schema": _schema,
    }
    return f.check_object(value, path, checks, required=("name", "schema"))


def _of_structured_outputs(value: dict[str, Any], limits: ServerLimits) -> StructuredOutput:
    text = f.text(limits.max_schema_bytes, flag="--max-schema-bytes")
    checks: dict[str, f.Check] = {
        "json": _schema,
        "regex": f.text(limits.max_regex_chars, min_chars=1, flag="--max-regex-chars"),
        "choice": f.listed(text, 1024, least=1),
        "grammar": text,
        "json_object": f.boolean,
    }
    given = f.check_object(value, "structured_outputs", checks)
    if "json" in given:
        given["json"] = _as_text(given["json"])
    return StructuredOutput(**given)


def _schema(value: Any, path: str) -> Any:
    if not isinstance(value, dict | bool | str) or value is None:
        raise f.wrong_type(path, value, "object")
    return value


def _as_text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


def renamed(error: RequestError, names: Mapping[str, str] | None) -> RequestError:
    """The error with the field under the name that the caller knows it by."""
    param = error.param or ""
    for ours, theirs in (names or {}).items():
        rest = param.removeprefix(ours)
        if param.startswith(ours) and rest[:1] in ("", ".", "["):
            name = theirs + rest
            told = name + error.message.removeprefix(param) if error.message.startswith(param) else error.message
            value, limit, flag = error.value, error.limit, error.flag
            return RequestError(name, value, limit, code=error.code, flag=flag, message=told, status=error.status)
    return error
