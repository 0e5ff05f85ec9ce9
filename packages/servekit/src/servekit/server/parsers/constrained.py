"""Calls that a grammar forced: the whole answer is JSON."""

from __future__ import annotations

from servekit.server.parsers.base import Malformed, Parser, Reading
from servekit.server.parsers.mistral import read_list


class RequiredParser(Parser):
    """A list of calls."""

    def read(self) -> Reading[None]:
        self.reader.mark()
        yield from self.reader.spaces()
        try:
            yield from read_list(self)
        except Malformed:
            self.content(self.reader.unmark())
            yield from self.reader.until([], self.content)


class NamedParser(Parser):
    """The arguments of the one function that the caller named."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def read(self) -> Reading[None]:
        self.begin_call(self._name)
        yield from self.reader.until([], self.arguments)
