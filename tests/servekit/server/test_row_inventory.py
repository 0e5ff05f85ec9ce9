"""Each row of the bad inputs that is the server's has a test that names it, or a reason here why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.servekit.server.rows import ROWS

TESTS = Path(__file__).parents[2]  # rows of the command line are trainkit's too
NUM_ROWS = {"srv": 193, "grm": 26, "cli": 23, "cfg": 14, "med": 42}
ADAPTERS = "there are no adapters yet"
TRANSFER = "there is no KV transfer yet"
ROUTER = "there is no router yet"
SIGHT = "no model here can see or hear; what it is sent is refused by test_images"
ABSENT = {
    **dict.fromkeys([f"med-{number:03}" for number in (3, 11, 12, 13, 33, 35, 36, 37, 38, 42)], SIGHT),
    **dict.fromkeys(("srv-176", "srv-189"), ADAPTERS),
    "srv-177": "there is no push of weights yet",
    **dict.fromkeys(("srv-191", "srv-192", "srv-193"), ROUTER),
    **dict.fromkeys(("cli-015", "cli-016", "cli-017"), TRANSFER),
}


def named() -> set[str]:
    """The rows that stand in tests, by number or in words."""
    found = {row.id for row in ROWS}
    for path in TESTS.rglob("test_*.py"):
        if path != Path(__file__):
            found |= set(re.findall(r"\b(?:srv|grm|cli|cfg|med)-\d{3}\b", path.read_text()))
    return found


def test_no_row_is_forgotten() -> None:
    every = {f"{surface}-{number:03}" for surface, most in NUM_ROWS.items() for number in range(1, most + 1)}
    assert every - named() == set(ABSENT)


@pytest.mark.parametrize("row", ABSENT)
def test_rows_of_what_is_not_there_are_skipped_by_name(row: str) -> None:
    pytest.skip(f"{row}: {ABSENT[row]}")
