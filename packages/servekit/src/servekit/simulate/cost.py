"""What a step costs: seconds, linear in the little that decides it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from common_platform.errors import ConfigError
from servekit.simulate.files import write_json


class StepShape(NamedTuple):
    """What a step computes, summed over its rows."""

    tokens: int  # computed
    rows: int
    context: int  # tokens whose keys and values are read, a row's own included
    pairs: int  # (query, key) of every token but a row's last: the square that a prefill adds


def row_pairs(end: int, num_tokens: int) -> int:
    """``StepShape.pairs`` of one row that computes its last ``num_tokens`` tokens up to ``end``."""
    return (num_tokens - 1) * (end - num_tokens) + num_tokens * (num_tokens - 1) // 2


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of a step; each coefficient is finite, 0 or more, and not all are 0.

    Raises:
        ConfigError: a coefficient is out of its range.
    """

    step_s: float = 0.0  # every step
    token_s: float = 0.0  # each token computed
    row_s: float = 0.0  # each row
    context_s: float = 0.0  # each token of context that is read
    pair_s: float = 0.0  # each (query, key) pair of a prefill

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"cost.{name}", value, "a finite number of seconds, 0 or more", flag="--cost")
        if self.step_s + self.token_s + self.row_s <= 0:
            limit = "step_s, token_s or row_s above 0: a step takes time"
            raise ConfigError("cost", msgspec.structs.asdict(self), limit, flag="--cost")

    def seconds(self, tokens: int, rows: int, context: int, pairs: int) -> float:
        """Of a step of this shape, see ``StepShape``."""
        return self.step_s + self.token_s * tokens + self.row_s * rows + self.context_s * context + self.pair_s * pairs

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            ResourceError: the file cannot be written.
        """
        write_json(self, path, "cost", flag="--out")

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> CostModel:
        """Read it from a file, or from JSON text that begins with a brace.

        Raises:
            ConfigError: it cannot be read, or a coefficient is unknown or out of its range.
        """
        text = os.fspath(source)
        try:
            body = text.encode() if text.lstrip().startswith("{") else Path(text).read_bytes()
            return msgspec.json.decode(body, type=cls)
        except OSError as error:
            raise ConfigError("cost", text, "a readable file, or JSON text", flag="--cost") from error
        except (msgspec.MsgspecError, UnicodeError) as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            fields = ", ".join(cls.__struct_fields__)
            message = f"cost: got {text[:80]!r}: {error}; allowed a JSON object with numbers for {fields}; --cost"
            raise ConfigError("cost", text, message=message) from error
