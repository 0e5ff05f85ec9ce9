"""What a stage has found so far, line by line in a file: it outlives the process that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Progress:
    """Written by the process of a stage; one that is started anew goes on where the last one broke off.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._begun = set(read(path)[1]) if path else set()

    def begins(self, case: str) -> bool:
        """Whether ``case`` is new; one that was begun before has ended its process, or is done."""
        if case in self._begun:
            return False
        self._begun.add(case)
        self._write({"begin": case})
        return True

    def put(self, value: Any, *at: str) -> None:
        """A figure, by the keys that lead to it."""
        self._write({"at": at, "value": value})

    def _write(self, line: dict[str, Any]) -> None:
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read(path: Path) -> tuple[Figures, list[str]]:
    """The figures, nested, and the cases that were begun; a last line that was cut off is left out."""
    figures: Figures = {}
    begun: list[str] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "begin" in line:
            begun.append(line["begin"])
            continue
        inner = figures
        for key in line["at"][:-1]:
            inner = inner.setdefault(key, {})
        inner[line["at"][-1]] = line["value"]
    return figures, begun
