"""An answer as a row of blocks, each of one kind: reasoning, text, or a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from servekit.server.turn import Answer, Call, Piece


class Kind(Enum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


class Move(Enum):
    OPEN = "open"
    MORE = "more"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """``text`` comes with MORE; ``call`` is the call of the block, where it is one."""

    move: Move
    kind: Kind
    index: int
    text: str = ""
    call: Call | None = None


class Blocks:
    """Opens a block where the kind changes, and with every call."""

    def __init__(self) -> None:
        self._index = -1
        self._open: tuple[Kind, Call | None] | None = None

    def add(self, piece: Piece, answer: Answer) -> Iterator[BlockEvent]:
        """What ``piece``, which is in ``answer`` already, does to the row."""
        if piece.delta.reasoning:
            yield from self._more(Kind.REASONING, piece.delta.reasoning)
        if piece.delta.content:
            yield from self._more(Kind.TEXT, piece.delta.content)
        for call in piece.delta.calls:
            if call.name is not None:
                yield from self._begin(Kind.CALL, answer.calls[call.index])
            if call.arguments:
                yield from self._more(Kind.CALL, call.arguments)

    def finish(self) -> Iterator[BlockEvent]:
        if self._open is not None:
            kind, call = self._open
            self._open = None
            yield BlockEvent(Move.CLOSE, kind, self._index, call=call)

    def _more(self, kind: Kind, text: str) -> Iterator[BlockEvent]:
        if self._open is None or self._open[0] is not kind:
            yield from self._begin(kind, None)
        yield BlockEvent(Move.MORE, kind, self._index, text, self._open[1] if self._open else None)

    def _begin(self, kind: Kind, call: Call | None) -> Iterator[BlockEvent]:
        yield from self.finish()
        self._index += 1
        self._open = (kind, call)
        yield BlockEvent(Move.OPEN, kind, self._index, call=call)
