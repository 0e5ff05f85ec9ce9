"""JSON as it should have been: no duplicate keys, no NaN, bounded size and depth, UTF-8 or nothing."""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 100 << 20
MAX_DEPTH = 32


def loads(data: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, constants: bool = False) -> Any:
    """The value in ``data``.

    Args:
        constants: let NaN and infinities through, for who looks at each number by its name.

    Raises:
        ValueError: the sentence says what is wrong and where.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes; allowed {max_bytes}")
    text = data.decode("utf-8")  # UnicodeDecodeError is a ValueError
    if _depth(text) > max_depth:
        raise ValueError(f"nested deeper than {max_depth}")
    return json.loads(text, object_pairs_hook=_object, parse_constant=float if constants else _constant)


def _depth(text: str) -> int:
    """The deepest nesting, without a parser whose own depth could be exhausted."""
    deepest = depth = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > deepest:
                deepest = depth
                if deepest > MAX_DEPTH * 32:
                    break
        elif char in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:64]!r} stands there twice")
        made[key] = value
    return made


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")
