"""Text as it comes: never half a character, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from servekit.engine.byte_level import TokenBytes
from servekit.engine.tokenizer import REPLACEMENT, Tokenizer

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """Turns tokens into text piece by piece; the pieces joined are the text of all tokens."""

    def add(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""

    def finish(self) -> str:
        """What is left, an unfinished character as the replacement character."""


def detokenizer_for(tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> Detokenizer:
    """The fastest one that is right for ``tokenizer``."""
    table = tokenizer.all_token_bytes(skip_special_tokens=skip_special_tokens)
    if table is None:
        return WindowDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return ByteDetokenizer(table)


class ByteDetokenizer:
    """Looks every token up; only parts of characters are decoded."""

    def __init__(self, table: TokenBytes) -> None:
        self._raw, self._texts = table.raw, table.texts
        self._size = len(table.raw)
        self._pending: codecs.IncrementalDecoder | None = None  # holds the beginning of a character

    def text_of(self, token_id: int) -> str | None:
        """What ``add`` would return, where that takes no more than a look; else None, and ``add`` must be asked."""
        return None if self._pending is not None or token_id >= self._size else self._texts[token_id]

    def add(self, token_id: int) -> str:
        if token_id >= self._size:
            return ""
        if self._pending is None:
            text = self._texts[token_id]
            if text is not None:
                return text
            self._pending = _utf8("replace")
        text = self._pending.decode(self._raw[token_id])
        if not self._pending.getstate()[0]:
            self._pending = None
        return text

    def finish(self) -> str:
        pending, self._pending = self._pending, None
        return pending.decode(b"", True) if pending else ""


class WindowDetokenizer:
    """For every tokenizer.

    A token's text may depend on the ones before it (spaces, bytes of one character), so the last few tokens are
    decoded again with each new one and the difference is what is new.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._context = 0  # where the window begins
        self._read = 0  # tokens before this one have been given out
        self._context_text = ""  # of the tokens from _context to _read

    def add(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith(REPLACEMENT) or len(text) <= len(self._context_text):
            return ""
        return self._give_out(text)

    def finish(self) -> str:
        """What is left, an unfinished character as the replacement character."""
        return self._give_out(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=self._skip)

    def _give_out(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._read = self._read, len(self._ids)
        self._context_text = self._decode() if self._context < self._read else ""
        return new


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, and holds back what may become one."""

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = list(stop)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def add(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is certain to belong to the answer. After ``found`` is set there is none."""
        if self.found is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        self._held = ""
        at = self._first(text) if may_stop else None
        if at is not None:
            start, self.found = at
            return text[: start + len(self.found)] if self._include else text[:start]
        keep = self._may_begin_at(text) if may_stop else len(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        """The earliest end wins, as if the text were read character by character; then the longest."""
        hits = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if not hits:
            return None
        end, _, stop = min(hits)
        return end - len(stop), stop

    def _may_begin_at(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stop) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
