"""What of a schema, regex or grammar can be refused by reading it, before any engine works on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common_platform.errors import ConfigError, RequestError
from servekit.sampling.parameters import StructuredOutput

SIZE_KEYWORDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
RANGES = (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"))
TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """How large a constraint may be; each has a flag of the server."""

    max_schema_bytes: int = 65_536
    max_schema_depth: int = 32  # schemas within schemas
    max_regex_chars: int = 4_096
    max_grammar_states: int = 100_000
    timeout_s: float = 5.0  # to compile one
    memory_bytes: int = 1 << 30  # of the process that compiles
    cache_bytes: int = 256 << 20  # of compiled grammars that are kept

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "more than 0")


def check_limits(spec: StructuredOutput, limits: GrammarLimits) -> None:
    """Raise RequestError for a constraint that is malformed, unsafe or too large.

    ``param`` of the error starts with the name of the spec's field (``json``, ``regex``, ``choice``, ``grammar``) and,
    inside a schema, goes on with the keyword at fault (``json.$ref``). Codes are ``grammar_invalid``,
    ``grammar_too_large``, ``grammar_too_deep``, ``grammar_recursive_ref``, ``grammar_remote_ref``,
    ``grammar_unsatisfiable`` and ``out_of_range``.
    """
    _check_unicode(spec)
    if spec.json is not None:
        _check_bytes("json", spec.json, limits)
        _check_schema(_parsed(spec.json), limits)
    elif spec.regex is not None:
        check_regex("regex", spec.regex, limits)
    elif spec.choice is not None:
        _check_choice(spec.choice, limits)
    elif spec.lark is not None:
        _check_bytes("lark", spec.lark, limits)
    elif spec.grammar is not None:
        _check_bytes("grammar", spec.grammar, limits)
        if not spec.grammar.strip():
            raise RequestError("grammar", spec.grammar, "a grammar with a start rule", code="grammar_invalid")


def _check_unicode(spec: StructuredOutput) -> None:
    for name in ("json", "regex", "grammar", "lark", "choice"):
        text = "".join(getattr(spec, name) or ())
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(name, text, "text without lone surrogates", code="grammar_invalid")


def _check_bytes(param: str, text: str, limits: GrammarLimits) -> None:
    size = len(text.encode())
    if size > limits.max_schema_bytes:
        raise RequestError(
            param, size, f"{limits.max_schema_bytes} bytes", code="grammar_too_large", flag="--max-schema-bytes"
        )


def _check_choice(choice: list[str], limits: GrammarLimits) -> None:
    if not choice or not all(choice):
        raise RequestError("choice", choice, "at least one text, none of them empty", code="grammar_unsatisfiable")
    _check_bytes("choice", "".join(choice), limits)


def _parsed(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError("json", text, "a JSON schema", code="grammar_invalid") from error
    if not isinstance(schema, dict | bool):
        raise RequestError("json", text, "a JSON schema: an object or a boolean", code="grammar_invalid")
    return schema


def _check_schema(root: Any, limits: GrammarLimits) -> None:
    states = 0
    stack: list[tuple[Any, int]] = [(root, 1)]
    while stack:
        schema, depth = stack.pop()
        if not isinstance(schema, dict):
            continue
        if depth > limits.max_schema_depth:
            raise RequestError(
                "json", depth, f"depth {limits.max_schema_depth}", code="grammar_too_deep", flag="--max-schema-depth"
            )
        _check_keywords(schema, limits)
        _check_reference(schema, root)
        states += len(schema.get("properties") or ()) + 1
        stack += [(inner, depth + 1) for inner in _inner_schemas(schema)]
    if states > limits.max_grammar_states // 20:
        raise RequestError(
            "json",
            states,
            f"{limits.max_grammar_states // 20} schemas and properties",
            code="grammar_too_large",
            flag="--max-grammar-states",
        )


def _inner_schemas(schema: dict[str, Any]) -> Iterator[Any]:
    for key, value in schema.items():
        if key in MAPS_OF_SCHEMAS and isinstance(value, dict):
            yield from value.values()
        elif key in LISTS_OF_SCHEMAS and isinstance(value, list):
            yield from value
        elif key in SCHEMAS:
            yield value


def _check_keywords(schema: dict[str, Any], limits: GrammarLimits) -> None:
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
            raise RequestError("json.type", kind, f"one of {TYPES}", code="grammar_invalid")
    for name in SIZE_KEYWORDS:
        value = schema.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise RequestError(f"json.{name}", value, "a number from 0", code="grammar_invalid")
        if value > limits.max_grammar_states:
            raise RequestError(
                f"json.{name}",
                value,
                f"0..{limits.max_grammar_states}",
                code="grammar_too_large",
                flag="--max-grammar-states",
            )
    for low, high in RANGES:
        if schema.get(low, 0) > schema.get(high, float("inf")):
            raise RequestError(
                "json", f"{low} {schema[low]} > {high} {schema[high]}", f"{low} <= {high}", code="grammar_unsatisfiable"
            )
    if "enum" in schema and not schema["enum"]:
        raise RequestError("json.enum", schema["enum"], "at least one value", code="grammar_unsatisfiable")
    if isinstance(schema.get("pattern"), str):
        check_regex("json.pattern", schema["pattern"], limits)


def _check_reference(schema: dict[str, Any], root: Any) -> None:
    """A reference must stay in the document, point at something, and not lead back to itself with nothing between."""
    seen: set[str] = set()
    while isinstance(schema, dict) and "$ref" in schema:
        target = schema["$ref"]
        if not isinstance(target, str):
            raise RequestError("json.$ref", target, "a text", code="grammar_invalid")
        if not target.startswith("#"):
            raise RequestError("json.$ref", target, "a reference within the schema (#/...)", code="grammar_remote_ref")
        if target in seen:
            raise RequestError(
                "json.$ref", target, "a reference that does not lead to itself", code="grammar_recursive_ref"
            )
        seen.add(target)
        schema = _pointed_at(root, target)


def _pointed_at(root: Any, target: str) -> Any:
    found = root
    for part in target.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise RequestError("json.$ref", target, "a place that is in the schema", code="grammar_invalid") from error
    return found


def check_regex(param: str, pattern: str, limits: GrammarLimits) -> None:
    """Raise RequestError for a pattern that is too long or that counts to too many states."""
    if len(pattern) > limits.max_regex_chars:
        raise RequestError(
            param,
            f"{len(pattern)} characters",
            f"{limits.max_regex_chars}",
            code="out_of_range",
            flag="--max-regex-chars",
        )
    states = regex_states(pattern)
    if states > limits.max_grammar_states // 2:
        raise RequestError(
            param,
            f"{states} states",
            f"{limits.max_grammar_states // 2} states",
            code="grammar_too_large",
            flag="--max-grammar-states",
        )


REGEX_PIECE = re.compile(r"\\.|\[(?:\\.|\[:\w+:\]|[^\]\\])+\]|\{(\d+)(,?)(\d*)\}|.", re.DOTALL)


def regex_states(pattern: str) -> int:
    """About how many states an automaton for ``pattern`` has: characters, times the counts that stand behind them."""
    open_groups: list[int] = []  # states of what stands before each open group
    states = last = 0
    for piece in REGEX_PIECE.finditer(pattern):
        text = piece.group()
        if piece.group(1) is not None:  # {m}, {m,} or {m,n} behind ``last``
            times = int(piece.group(3) or piece.group(1))
            states += last * max(times - 1, 0)
            last *= max(times, 1)
        elif text == "(":
            open_groups.append(states)
            states = last = 0
        elif text == ")" and open_groups:
            last = states
            states += open_groups.pop()
        else:
            states, last = states + 1, 1
    return states + sum(open_groups)
