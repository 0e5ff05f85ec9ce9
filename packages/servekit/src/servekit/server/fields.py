"""Checks of single fields: each takes a value from outside and its path, and returns what may be used.

A check raises RequestError with the path as ``param``. Booleans are not integers, numbers are not strings, and
nothing is without a bound. What a check takes it also says as a JSON schema, for the description of the routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from common_platform.errors import RequestError
from servekit.server.json_body import type_name

Check = Callable[[Any, str], Any]
C = TypeVar("C", bound=Check)
INT64 = 2**63


def described(schema: dict[str, Any] | None) -> Callable[[C], C]:
    """Say with a check what it takes; None as a schema: nothing that a caller should send."""

    def mark(check: C) -> C:
        check.schema = schema  # type: ignore[attr-defined]
        return check

    return mark


def schema_of(check: Check) -> dict[str, Any] | None:
    """The JSON schema of what ``check`` takes, {} where it is not said, None for a field that is refused."""
    found: dict[str, Any] | None = getattr(check, "schema", {})
    return found


def wrong_type(path: str, value: object, wanted: str) -> RequestError:
    shown = f"{type_name(value)} {value!r}" if isinstance(value, str | int | float) else type_name(value)
    return RequestError(path, shown, wanted, code="invalid_type")


def unsupported(path: str, value: object, allowed: str, flag: str | None = None) -> RequestError:
    return RequestError(path, value, allowed, code="unsupported", flag=flag)


@described({"type": "boolean"})
def boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(path, value, "boolean")
    return value


def integer(low: int, high: int, flag: str | None = None, allowed: str | None = None) -> Check:
    @described({"type": "integer", "minimum": low, "maximum": high})
    def check(value: Any, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(path, value, "integer")
        if not low <= value <= high:
            raise RequestError(path, value, allowed or f"{low}..{high}", code="out_of_range", flag=flag)
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number in [low, high], or in (low, high] with ``above``."""

    @described({"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high})
    def check(value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(path, value, "number")
        if not ((low < value if above else low <= value) and value <= high):
            allowed = f"({low:g},{high:g}]" if above else f"{low:g}..{high:g}"
            finite = isinstance(value, int) or math.isfinite(value)
            raise RequestError(path, value, allowed if finite else f"a finite number, {allowed}", code="out_of_range")
        return float(value)

    return check


def text(max_chars: int, *, min_chars: int = 0, flag: str | None = None) -> Check:
    @described({"type": "string", "minLength": min_chars, "maxLength": max_chars})
    def check(value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(path, value, "string")
        if not min_chars <= len(value) <= max_chars:
            got = f"{len(value)} characters" if value else "an empty string"
            raise RequestError(path, got, f"{min_chars}..{max_chars} characters", code="out_of_range", flag=flag)
        return value

    return check


def one_of(*choices: str, code: str = "unsupported") -> Check:
    @described({"enum": list(choices)})
    def check(value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(path, value, "string")
        if value not in choices:
            raise RequestError(path, value, f"one of {', '.join(choices)}", code=code)
        return value

    return check


def listed(check_item: Check, most: int, *, least: int = 0, flag: str | None = None) -> Check:
    """A list of ``least`` to ``most`` items; the length is checked before any item."""

    @described({"type": "array", "items": schema_of(check_item) or {}, "minItems": least, "maxItems": most})
    def check(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(path, value, "array")
        if not least <= len(value) <= most:
            got = f"{len(value)} entries" if value else "an empty array"
            raise RequestError(path, got, f"{least}..{most} entries", code="out_of_range", flag=flag)
        return [check_item(item, f"{path}[{index}]") for index, item in enumerate(value)]

    return check


def token_ids(vocab_size: int, most: int, *, least: int = 0, flag: str | None = None) -> Check:
    return listed(integer(0, vocab_size - 1, allowed=f"token ids 0..{vocab_size - 1}"), most, least=least, flag=flag)


def any_value(value: Any, path: str) -> Any:
    """A value that somebody else will check."""
    return value


@described({"type": "object"})
def any_object(value: Any, path: str) -> dict[str, Any]:
    """An object that is taken as it is; the body's own limits bound it."""
    if not isinstance(value, dict):
        raise wrong_type(path, value, "object")
    return value


def refused(allowed: str, *, code: str = "unsupported", flag: str | None = None) -> Check:
    """A field that we know and do not serve."""

    @described(None)
    def check(value: Any, path: str) -> Any:
        raise RequestError(path, type_name(value), allowed, code=code, flag=flag)

    return check


def object_schema(checks: Mapping[str, Check], *required: str) -> dict[str, Any]:
    """The JSON schema of an object with these fields; those that are refused are left out."""
    found = {name: schema_of(check) for name, check in checks.items()}
    properties = {name: schema for name, schema in found.items() if schema is not None}
    made: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | ({"required": list(required)} if required else {})


def check_object(
    body: Any,
    path: str,
    checks: Mapping[str, Check],
    *,
    required: tuple[str, ...] = (),
    nullable: bool = True,
    ignore_unknown: bool = False,
) -> dict[str, Any]:
    """The fields of an object, each checked, in the order they stand in the body.

    null means absent, except for a required field.
    """
    if not isinstance(body, dict):
        raise wrong_type(path, body, "object")
    prefix = f"{path}." if path else ""
    checked: dict[str, Any] = {}
    for name, value in body.items():
        check = checks.get(name)
        if check is None:
            if not ignore_unknown:
                raise _unknown(f"{prefix}{name[:64]}")
        elif value is not None or name in required or not nullable:
            checked[name] = check(value, f"{prefix}{name}")
    for name in required:
        if name not in checked:
            raise RequestError(f"{prefix}{name}", "nothing", "a value: it is required", code="missing_field")
    return checked


def _unknown(path: str) -> RequestError:
    return RequestError(
        path, "an unknown field", "known fields only", code="unknown_field", flag="--ignore-unknown-fields"
    )
