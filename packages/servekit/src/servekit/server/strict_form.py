"""What the grammars of strict calls are written for, and with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servekit.sampling.structured.grammar import JSON_STYLE
from servekit.server.call_schemas import any_call, parameters_of

Tool = dict[str, Any]
ANY = r"(.|\n)*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What a grammar is written for. ``special_ids``: the tokenizer's special tokens, by their text."""

    tools: Sequence[Tool]
    is_parallel: bool
    reasoning: str  # the name of the reasoning parser; empty for none
    special_ids: Mapping[str, int]

    def mark(self, text: str) -> str:
        """``text`` as the grammar's own: a special token, or a string."""
        return f"<[{self.special_ids[text]}]>" if text in self.special_ids else json.dumps(text)

    def any_json_call(self, key: str) -> str:
        return json_rule(any_call(self.tools, key, strict_only=True))

    @property
    def times(self) -> str:
        return "*" if self.is_parallel else "?"

    def arguments(self, index: int) -> str:
        return json_rule(parameters_of(self.tools, index, strict_only=True))

    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that fits ``schema``, as a part of a rule."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def regex_of(text: str) -> str:
    """What matches ``text`` and nothing else."""
    return "".join(f"\\{char}" if char in "\\.+*?()|[]{}^$/" else char for char in text)
