"""JSON from outside: what it says is what it is, or it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from common_platform.errors import RequestError
from servekit.server.limits import ServerLimits

MAX_INTEGER_DIGITS = 24
PARSER_DEPTH = 256  # deeper than this is not parsed at all, so its field has no name
_LONG_INTEGER = re.compile(r"\d{25}")  # one more
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes, limits: ServerLimits) -> dict[str, Any]:
    """The object in ``data``, which is UTF-8 without duplicate keys, NaN, lone surrogates or deep nesting.

    Raises:
        RequestError: the first fault; ``param`` is the dotted path to it where it has one.
    """
    text = _decode(data)
    depth = _measure(text, limits)
    root, has_duplicates = _load(text)
    if not isinstance(root, dict):
        message = f"the body: got {type_name(root)}, want object: {_cut(text)}"
        raise RequestError(code="invalid_type", message=message)
    if depth > limits.max_json_depth:
        raise _too_deep(_field_at_depth(root, limits.max_json_depth), depth, limits)
    for path, value in _walk("", root) if has_duplicates else ():
        if isinstance(value, _Duplicates):
            raise RequestError(_join(path, value.key), "the key twice", "once", code="duplicate_key")
    if _ESCAPED_SURROGATE.search(data):
        _refuse_surrogates(root)
    return root


def type_name(value: object) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _decode(data: bytes) -> str:
    if not data.strip():
        raise RequestError(code="invalid_json", message="the body: got an empty body; allowed a JSON object")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the body: not valid UTF-8 at byte {error.start}"
        raise RequestError(code="invalid_utf8", message=message) from error


def _measure(text: str, limits: ServerLimits) -> int:
    """The depth below the outermost object, found without recursion; strings cost one regex match each."""
    depth = deepest = nodes = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        if first in "]}":
            depth -= 1
            continue
        nodes += 1
        if nodes > limits.max_json_nodes:
            message = (
                f"the body: more than {limits.max_json_nodes} arrays, objects and strings; change with --max-json-nodes"
            )
            raise RequestError(code="json_too_deep", message=message)
        if first != '"':
            depth += 1
            deepest = max(deepest, depth)
            if deepest > PARSER_DEPTH:
                raise _too_deep(None, deepest - 1, limits)
    return deepest - 1


def _too_deep(field: str | None, depth: int, limits: ServerLimits) -> RequestError:
    what = f"{field or 'the body'}: nested {depth} deep or deeper"
    message = f"{what}; allowed {limits.max_json_depth}; change with --max-json-depth"
    return RequestError(field, code="json_too_deep", message=message)


def _field_at_depth(root: dict[str, Any], limit: int) -> str | None:
    return next((name for name, value in root.items() if _depth(value) > limit), None)


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(_depth, children), default=0)


class _Duplicates(dict[str, Any]):
    """An object with a key that stood there twice."""

    key = ""


def _load(text: str) -> tuple[Any, bool]:
    """The value, and whether any object in it is marked as having a key twice."""
    marked: list[_Duplicates] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        marked.append(_Duplicates(made))
        marked[-1].key = _first_repeated([key for key, _ in pairs])
        return marked[-1]

    parse_int = _integer if _LONG_INTEGER.search(text) else None
    try:
        root = json.loads(text, object_pairs_hook=make_object, parse_constant=_constant, parse_int=parse_int)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode("utf-8"))
        raise RequestError(code="invalid_json", message=f"the body: not JSON at byte {at}: {error.msg}") from error
    return root, bool(marked)


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("no key is repeated")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        message = f"the body: an integer too long: {len(digits)} digits; allowed {MAX_INTEGER_DIGITS}"
        raise RequestError(code="invalid_json", message=message)
    return int(digits)


def _constant(word: str) -> NoReturn:
    raise RequestError(code="invalid_json", message=f"the body: {word} is not JSON")


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _walk(_join(path, key), child)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _walk(f"{path}[{index}]", child)


def _join(path: str, key: str) -> str:
    shown = _SURROGATE.sub("?", key)[:64]
    return f"{path}.{shown}" if path else shown


def _refuse_surrogates(root: dict[str, Any]) -> None:
    for path, value in _walk("", root):
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
        for text in texts:
            found = _SURROGATE.search(text)
            if found:
                what = f"a lone surrogate at position {found.start()}"
                raise RequestError(path or None, what, "valid Unicode", code="invalid_unicode")


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 64 else text[:61] + "..."
