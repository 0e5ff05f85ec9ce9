"""Mistral: ``[TOOL_CALLS]`` before a JSON list of calls, or before each as ``name{...}`` or ``name[ARGS]{...}``."""

from __future__ import annotations

from servekit.server.parsers.base import Malformed, Parser, Reading, drop
from servekit.server.parsers.json_calls import read_call

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class MistralParser(Parser):
    needs_special_tokens = True

    def read(self) -> Reading[None]:
        while (yield from self.reader.until([BEGIN], self.content)):
            yield from self._calls()

    def _calls(self) -> Reading[None]:
        self.reader.mark()
        before = self._num_calls
        try:
            yield from self.reader.spaces()
            if (yield from self.reader.peek()) == "[":
                yield from read_list(self)
            else:
                yield from self._named()
        except Malformed:
            taken = self.reader.unmark()
            self.content(taken if self._num_calls > before else BEGIN + taken)
            return
        yield from self.reader.spaces()

    def _named(self) -> Reading[None]:
        name = yield from self.reader.take_while(lambda char: char not in "[{" and not char.isspace())
        yield from self.reader.spaces()
        if not name:
            raise Malformed
        if (yield from self.reader.take_if(CALL_ID)):
            yield from self.reader.until([ARGS], drop)
        else:
            yield from self.reader.take_if(ARGS)
        yield from self.reader.spaces()
        if (yield from self.reader.peek()) != "{":
            raise Malformed
        self.reader.unmark()
        self.begin_call(name)
        yield from self.reader.json_value(self.arguments)


def read_list(parser: Parser) -> Reading[None]:
    """A JSON list of calls.

    Raises:
        Malformed: what was taken since the reader's mark is no call.
    """
    reader = parser.reader
    yield from reader.expect("[")
    while True:
        yield from read_call(parser)
        reader.mark()
        yield from reader.spaces()
        if not (yield from reader.take_if(",")):
            yield from reader.take_if("]")
            reader.unmark()
            return
