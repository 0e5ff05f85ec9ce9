"""Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number, among text."""

from __future__ import annotations

from servekit.server.parsers.base import Malformed, Parser, Reading, drop
from servekit.server.parsers.json_calls import read_call

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(Parser):
    def read(self) -> Reading[None]:
        while True:
            space = yield from self.reader.spaces()  # around calls it is no content
            is_call = yield from self.reader.take_if(BEGIN)
            if not is_call:
                is_over = not (yield from self.reader.peek())
                self.content("" if is_over and self._num_calls else space)
                if is_over:
                    return
                if not (yield from self.reader.until([BEGIN], self.content)):
                    return
            yield from self._call()

    def _call(self) -> Reading[None]:
        self.reader.mark()
        try:
            yield from read_call(self)
        except Malformed:
            self.content(BEGIN + self.reader.unmark())
            return
        yield from self.reader.until([END], drop)
