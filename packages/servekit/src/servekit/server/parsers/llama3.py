"""Llama 3: the whole answer is ``{"name": ..., "parameters": {...}}``, or several with ``;`` between them."""

from __future__ import annotations

from servekit.server.parsers.base import Malformed, Parser, Reading
from servekit.server.parsers.json_calls import read_call

PYTHON_TAG = "<|python_tag|>"


class Llama3Parser(Parser):
    needs_special_tokens = True

    def read(self) -> Reading[None]:
        space = yield from self.reader.spaces()
        is_tagged = yield from self.reader.take_if(PYTHON_TAG)
        if not is_tagged:
            self.content("" if (yield from self.reader.peek()) == "{" else space)
        while (yield from self.reader.peek()) == "{":
            self.reader.mark()
            try:
                yield from read_call(self)
            except Malformed:
                self.content(("" if self._num_calls else space) + self.reader.unmark())
                break
            yield from self.reader.spaces()
            if not (yield from self.reader.take_if(";")):
                break
            yield from self.reader.spaces()
        yield from self.reader.until([PYTHON_TAG], self.content)
        yield from self.reader.until([], self.content)
