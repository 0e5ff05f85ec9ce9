"""DeepSeek V3 (``function<sep>name`` and a block of JSON) and V3.1 (``name<sep>{...}``), between their own marks."""

from __future__ import annotations

from servekit.server.parsers.base import Malformed, Parser, Reading, drop

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FENCE = "```json"


class DeepSeekParser(Parser):
    needs_special_tokens = True

    def read(self) -> Reading[None]:
        while (yield from self.reader.until([CALLS_BEGIN], self.content)):
            while (yield from self.reader.until([CALL_BEGIN, CALLS_END], drop)) == CALL_BEGIN:
                yield from self._call()

    def _call(self) -> Reading[None]:
        self.reader.mark()
        try:
            yield from self._head()
        except Malformed:
            self.content(CALL_BEGIN + self.reader.unmark())
            return
        if not (yield from self.reader.json_value(self.arguments)):
            return
        yield from self.reader.until([CALL_END], drop)

    def _head(self) -> Reading[None]:
        pieces: list[str] = []
        if not (yield from self.reader.until([SEP], pieces.append)):
            raise Malformed
        name = "".join(pieces).strip()
        if name == "function":
            name = (yield from self.reader.take_while(lambda char: char not in "\n`{")).strip()
            yield from self.reader.spaces()
            yield from self.reader.take_if(FENCE)
        yield from self.reader.spaces()
        if not name or (yield from self.reader.peek()) != "{":
            raise Malformed
        self.reader.unmark()
        self.begin_call(name)
