"""Reasoning between two marks before the answer."""

from __future__ import annotations

from servekit.server.parsers.base import Parser, Reading


class ReasoningParser(Parser):
    """Splits what comes before the end mark from what follows it.

    Args:
        is_special: the marks are special tokens.
        begins_inside: the prompt ends within the reasoning, so the first mark need not come.
    """

    reads_reasoning = True

    def __init__(self, begin: str, end: str, *, begins_inside: bool, is_special: bool = False) -> None:
        super().__init__()
        self.needs_special_tokens = is_special
        self._begin, self._end, self._begins_inside = begin, end, begins_inside

    def read(self) -> Reading[None]:
        space = yield from self.reader.spaces()
        is_marked = yield from self.reader.take_if(self._begin)
        if is_marked or self._begins_inside:
            self.reasoning("" if is_marked else space)
            if not (yield from self.reader.until([self._end], self.reasoning)):
                return
            yield from self.reader.spaces()
        else:
            self.content(space)
        yield from self.reader.until([], self.content)
