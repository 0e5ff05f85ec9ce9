"""Calls as a Python list: ``[f(a=1, b="x"), g()]`` is the whole answer. Read by hand, never evaluated."""

from __future__ import annotations

import json
from typing import Any

from servekit.server.parsers.base import Malformed, Parser, Reader, Reading

MAX_DEPTH = 32
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"


class PythonicParser(Parser):
    needs_special_tokens = True

    def read(self) -> Reading[None]:
        space = yield from self.reader.spaces()
        is_marked = yield from self.reader.take_if(PYTHON_START)
        if (yield from self.reader.peek()) != "[":
            self.content("" if is_marked else space)
        else:
            self.reader.mark()
            try:
                yield from self._calls()
            except Malformed:
                self.content(("" if self._num_calls else space) + self.reader.unmark())
            else:
                self.reader.unmark()
                yield from self.reader.spaces()
        yield from self.reader.until([PYTHON_END], self.content)
        yield from self.reader.until([], self.content)

    def _calls(self) -> Reading[None]:
        yield from self.reader.expect("[")
        while True:
            yield from self.reader.spaces()
            name, arguments = yield from _call(self.reader)
            self.begin_call(name)
            self.arguments(json.dumps(arguments, ensure_ascii=False))
            self.reader.mark()  # what has been given out is not taken back
            yield from self.reader.spaces()
            if not (yield from self.reader.take_if(",")):
                yield from self.reader.expect("]")
                return


def _call(reader: Reader) -> Reading[tuple[str, dict[str, Any]]]:
    name = yield from _word(reader)
    yield from reader.expect("(")
    arguments: dict[str, Any] = {}
    while True:
        yield from reader.spaces()
        if (yield from reader.take_if(")")):
            return name, arguments
        key = yield from _word(reader)
        yield from reader.spaces()
        yield from reader.expect("=")
        if key in arguments:
            raise Malformed  # as Python says, too
        arguments[key] = yield from _literal(reader, 0)
        yield from reader.spaces()
        if not (yield from reader.take_if(",")):
            yield from reader.expect(")")
            return name, arguments


def _word(reader: Reader) -> Reading[str]:
    word = yield from reader.take_while(lambda char: char.isalnum() or char in "_.-")
    if not word or word[0].isdigit():
        raise Malformed
    return word


def _literal(reader: Reader, depth: int) -> Reading[Any]:
    if depth > MAX_DEPTH:
        raise Malformed
    yield from reader.spaces()
    first = yield from reader.peek()
    if first and first in "\"'":
        return (yield from _string(reader))
    if first and first in "[(":
        return (yield from _items(reader, "]" if first == "[" else ")", depth))
    if first == "{":
        return (yield from _dict(reader, depth))
    word = yield from reader.take_while(lambda char: char.isalnum() or char in "+-._")
    if word in WORDS:
        return WORDS[word]
    return _number(word)


def _number(word: str) -> int | float:
    if not word or not (word[0].isdigit() or word[0] in "+-.") or len(word) > 64 or "_" in word:
        raise Malformed
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError as error:
        raise Malformed from error


def _items(reader: Reader, end: str, depth: int) -> Reading[list[Any]]:
    yield from reader.take()
    items: list[Any] = []
    while True:
        yield from reader.spaces()
        if (yield from reader.take_if(end)):
            return items
        items.append((yield from _literal(reader, depth + 1)))
        yield from reader.spaces()
        if not (yield from reader.take_if(",")):
            yield from reader.expect(end)
            return items


def _dict(reader: Reader, depth: int) -> Reading[dict[str, Any]]:
    yield from reader.take()
    found: dict[str, Any] = {}
    while True:
        yield from reader.spaces()
        if (yield from reader.take_if("}")):
            return found
        key = yield from _literal(reader, depth + 1)
        if isinstance(key, list | dict):
            raise Malformed
        yield from reader.spaces()
        yield from reader.expect(":")
        found[str(key)] = yield from _literal(reader, depth + 1)
        yield from reader.spaces()
        if not (yield from reader.take_if(",")):
            yield from reader.expect("}")
            return found


def _string(reader: Reader) -> Reading[str]:
    quote = yield from reader.take()
    made: list[str] = []
    while char := (yield from reader.take()):
        if char == quote:
            return "".join(made)
        made.append(char if char != "\\" else (yield from _escaped(reader)))
    raise Malformed


def _escaped(reader: Reader) -> Reading[str]:
    char = yield from reader.take()
    if char not in HEX_ESCAPES:
        return ESCAPES.get(char, char if char in "\\'\"" else "\\" + char)
    digits = ""
    for _ in range(HEX_ESCAPES[char]):
        digits += yield from reader.take()
    try:
        made = chr(int(digits, 16))
    except (ValueError, OverflowError) as error:
        raise Malformed from error
    if "\ud800" <= made <= "\udfff":
        raise Malformed
    return made
