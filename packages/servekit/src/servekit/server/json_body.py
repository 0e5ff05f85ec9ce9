"""A request's body as a JSON object, strictly: what a lenient parser would guess at is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

from common_platform.errors import RequestError
from servekit.server.limits import ServerLimits

STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
BRACKETS = re.compile(rb"[\[\]{}]")
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DIGITS = 20
PARSER_DEPTH = 400  # what Python's parser takes without exhausting its stack
NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def json_name(value: Any) -> str:
    return "null" if value is None else NAMES.get(type(value), "value")


def parse_object(data: bytes, limits: ServerLimits) -> dict[str, Any]:
    """The object in ``data``.

    Raises:
        RequestError: status 400, with one of the codes invalid_json, invalid_type, json_too_deep, duplicate_key,
            invalid_utf8, invalid_unicode.
    """
    if not data.strip():
        raise _invalid("an empty body")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(None, f"byte {error.start} is not UTF-8", "UTF-8", code="invalid_utf8") from error
    if _depth(data) > PARSER_DEPTH:
        raise _too_deep(None, f"more than {PARSER_DEPTH} levels", limits)
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from error
    if not isinstance(found, dict):
        raise RequestError(None, f"{json_name(found)} {str(found)[:40]}", "a JSON object", code="invalid_type")
    _Walk(limits).check(found)
    return found


def _invalid(what: str) -> RequestError:
    return RequestError(None, what, "JSON", code="invalid_json")


def _too_deep(param: str | None, what: str, limits: ServerLimits) -> RequestError:
    return RequestError(param, what, f"{limits.max_json_depth}", code="json_too_deep", flag="--max-json-depth")


def _depth(data: bytes) -> int:
    deepest = depth = 0
    for bracket in BRACKETS.findall(STRINGS.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise RequestError(key, "the key twice", "each key once", code="duplicate_key")
        made[key] = value
    return made


def _constant(word: str) -> Any:
    raise _invalid(f"{word} is not JSON")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise _invalid(f"an integer too long: {len(digits)} digits")
    return int(digits)


class _Walk:
    """Depth, number of values, and text that is not Unicode, each with the place where it stands."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._nodes = 0

    def check(self, body: dict[str, Any]) -> None:
        for key, value in body.items():
            self._text(key, "")
            self._value(value, key, 2, key)

    def _value(self, value: Any, path: str, depth: int, top: str) -> None:
        self._nodes += 1
        if self._nodes > self._limits.max_json_nodes:
            what, limit = "too many values", f"{self._limits.max_json_nodes} values"
            raise RequestError(top, what, limit, code="json_too_deep", flag="--max-json-nodes")
        if isinstance(value, str):
            self._text(value, path)
        elif isinstance(value, dict | list):
            if depth > self._limits.max_json_depth:
                raise _too_deep(top, f"{depth} levels", self._limits)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                if isinstance(key, str):
                    self._text(key, path)
                self._value(inner, f"{path}.{key}" if isinstance(key, str) else f"{path}[{key}]", depth + 1, top)

    @staticmethod
    def _text(text: str, path: str) -> None:
        found = None if text.isascii() else SURROGATE.search(text)
        if found:
            at = f"a lone surrogate at position {found.start()}"
            raise RequestError(path or None, at, "valid Unicode", code="invalid_unicode")
