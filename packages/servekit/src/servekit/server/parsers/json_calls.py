"""Calls written as JSON objects: ``{"name": ..., "arguments": {...}}``, in any order of the keys."""

from __future__ import annotations

import json

from servekit.server.parsers.base import Malformed, Parser, Reading, drop

ARGUMENTS = ("arguments", "parameters")


def read_call(parser: Parser) -> Reading[None]:
    """Read one object and give its call out as it comes.

    Raises:
        Malformed: it is no call. After the name is known nothing raises: what came is the call.
    """
    reader = parser.reader
    held: list[str] | None = []  # arguments that came before the name
    has_arguments = False
    yield from reader.spaces()
    yield from reader.expect("{")
    try:
        while True:
            yield from reader.spaces()
            key = _plain((yield from reader.json_string()))
            yield from reader.spaces()
            yield from reader.expect(":")
            yield from reader.spaces()
            if key == "name" and held is not None:
                parser.begin_call(_plain((yield from reader.json_string())))
                parser.arguments("".join(held))
                held = None
                reader.unmark()
            elif key in ARGUMENTS and not has_arguments:
                has_arguments = True
                emit = parser.arguments if held is None else held.append
                if (yield from reader.peek()) == '"':  # some write JSON into a string
                    emit(_plain((yield from reader.json_string())))
                elif not (yield from reader.json_value(emit)):
                    return _cut_off(held)
            else:
                yield from reader.json_value(drop)
            yield from reader.spaces()
            if not (yield from reader.take_if(",")):
                yield from reader.expect("}")
                break
    except Malformed:
        if held is not None:
            raise
        return None
    if held is not None:
        raise Malformed
    if not has_arguments:
        parser.arguments("{}")
    return None


def _cut_off(held: list[str] | None) -> None:
    if held is not None:
        raise Malformed


def _plain(raw: str) -> str:
    try:
        text: str = json.loads(raw, strict=False)
    except json.JSONDecodeError as error:
        raise Malformed from error
    return text
