"""gpt-oss: messages in channels. ``analysis`` is reasoning, ``commentary to=functions.f`` a call, the rest the text."""

from __future__ import annotations

import re

from servekit.server.parsers.base import Emit, Parser, Reading, drop

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ["<|end|>", "<|call|>", "<|return|>", START]
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


class HarmonyParser(Parser):
    needs_special_tokens = True
    reads_reasoning = True

    def read(self) -> Reading[None]:
        space = yield from self.reader.spaces()
        if not (yield from self._begins_with_header()):
            self.content(space)
            yield from self.reader.until([], self.content)
            return
        while True:
            header: list[str] = []
            if not (yield from self.reader.until([MESSAGE], header.append)):
                return
            end = yield from self.reader.until(ENDS, self._reader_of("".join(header)))
            if end != START and not (yield from self.reader.until([START], drop)):
                return

    def _begins_with_header(self) -> Reading[bool]:
        """The prompt ends with ``<|start|>assistant``, so a channel or a recipient comes first."""
        if (yield from self.reader.peek()) == "t":
            return (yield from self.reader.take_if("to="))
        if (yield from self.reader.take_if(CHANNEL)):
            return True
        return (yield from self.reader.take_if(START))

    def _reader_of(self, header: str) -> Emit:
        recipient = RECIPIENT.search(header)
        if recipient:
            self.begin_call(recipient[1])
            return self.arguments
        return self.reasoning if "analysis" in header else self.content
