"""Parsers of text that comes in pieces: written as one straight generator each, which waits by yielding.

Whatever the pieces, the deltas joined are the same, for a parser only decides when what it has read decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Emit = Callable[[str], None]


@dataclass(slots=True)
class CallDelta:
    """A piece of the call with this number; ``name`` comes with the first piece only."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Delta:
    """What a piece of text added."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    @property
    def is_content(self) -> bool:
        """Whether it is nothing but content."""
        return not (self.reasoning or self.calls)

    def add(self, other: Delta) -> None:
        self.content += other.content
        self.reasoning += other.reasoning
        for call in other.calls:
            self.add_call(call)

    def add_call(self, call: CallDelta) -> None:
        if self.calls and call.name is None and self.calls[-1].index == call.index:
            self.calls[-1].arguments += call.arguments
        else:
            self.calls.append(CallDelta(call.index, call.name, call.arguments))


class Malformed(Exception):
    """The text is not what it seemed to become."""


class Reader:
    """The text so far, from which a parser takes."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what is before this has been taken
        self._ended = False
        self._marked: list[str] | None = None

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def end(self) -> None:
        self._ended = True

    def mark(self) -> None:
        """Remember what is taken from here on, until ``unmark``."""
        self._marked = []

    def unmark(self) -> str:
        """What was taken since ``mark``."""
        taken, self._marked = "".join(self._marked or ()), None
        return taken

    def _take_to(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        if self._marked is not None:
            self._marked.append(text)
        return text

    def peek(self) -> Reading[str]:
        """The next character, not taken; empty at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def take(self) -> Reading[str]:
        char = yield from self.peek()
        return self._take_to(self._at + len(char))

    def take_if(self, marker: str) -> Reading[bool]:
        """Take ``marker`` where it comes next."""
        while (
            not self._ended and len(self._text) - self._at < len(marker) and marker.startswith(self._text[self._at :])
        ):
            yield
        if not self._text.startswith(marker, self._at):
            return False
        self._take_to(self._at + len(marker))
        return True

    def expect(self, marker: str) -> Reading[None]:
        if not (yield from self.take_if(marker)):
            raise Malformed

    def spaces(self) -> Reading[str]:
        return (yield from self.take_while(str.isspace))

    def take_while(self, wanted: Callable[[str], bool]) -> Reading[str]:
        taken = []
        while (char := (yield from self.peek())) and wanted(char):
            taken.append(self._take_to(self._at + 1))
        return "".join(taken)

    def until(self, markers: Sequence[str], emit: Emit) -> Reading[str]:
        """Emit what comes before the first of ``markers``, as early as it is certain; the marker, or empty at the end.

        The marker is taken.
        """
        while True:
            places = [(self._text.find(marker, self._at), marker) for marker in markers]
            found = min((place for place in places if place[0] >= 0), default=None)
            if found is not None:
                emit(self._take_to(found[0]))
                return self._take_to(found[0] + len(found[1]))
            sure = len(self._text) - (0 if self._ended else _undecided(self._text[self._at :], markers))
            if sure > self._at:
                emit(self._take_to(sure))
            if self._ended:
                return ""
            yield

    def json_value(self, emit: Emit) -> Reading[bool]:
        """Emit one JSON value as it is written; False where the text ended within it."""
        first = yield from self.peek()
        if first and first in "{[":
            return (yield from self._json_nested(emit))
        if first == '"':
            emit((yield from self.json_string()))
            return True
        emit((yield from self.take_while(lambda char: char not in ",]}" and not char.isspace())))
        return True

    def _json_nested(self, emit: Emit) -> Reading[bool]:
        depth, in_string, escaped = 0, False, False
        while True:
            for at in range(self._at, len(self._text)):
                char = self._text[at]
                if in_string:
                    in_string = escaped or char != '"'
                    escaped = char == "\\" and not escaped
                elif char == '"':
                    in_string = True
                elif char in "{[":
                    depth += 1
                elif char in "}]":
                    depth -= 1
                    if depth == 0:
                        emit(self._take_to(at + 1))
                        return True
            if self._at < len(self._text):
                emit(self._take_to(len(self._text)))
            if self._ended:
                return False
            yield

    def json_string(self) -> Reading[str]:
        """A JSON string with its quotes, as it is written."""
        yield from self.expect('"')
        taken = ['"']
        while char := (yield from self.take()):
            taken.append(char)
            if char == "\\":
                taken.append((yield from self.take()))
            elif char == '"':
                return "".join(taken)
        raise Malformed


def _undecided(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


class Parser(ABC):
    """Text in pieces in, deltas out."""

    needs_special_tokens = False  # in the text, because its markers are such
    reads_reasoning = False  # besides calls

    def __init__(self) -> None:
        self.reader = Reader()
        self._delta = Delta()
        self._num_calls = 0
        self._reading: Reading[None] | None = self.read()

    @abstractmethod
    def read(self) -> Reading[None]:
        """The parser itself."""

    def add(self, text: str) -> Delta:
        self.reader.feed(text)
        return self._advance()

    def finish(self) -> Delta:
        """What was held back."""
        self.reader.end()
        return self._advance()

    def _advance(self) -> Delta:
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
        made, self._delta = self._delta, Delta()
        return made

    def content(self, text: str) -> None:
        self._delta.content += text

    def reasoning(self, text: str) -> None:
        self._delta.reasoning += text

    def begin_call(self, name: str) -> None:
        self._delta.add_call(CallDelta(self._num_calls, name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the call that was begun last."""
        if text:
            self._delta.add_call(CallDelta(self._num_calls - 1, None, text))


def drop(text: str) -> None:
    """Text that nobody is shown."""
