"""Times as users write them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from common_platform.errors import ConfigError

Duration = timedelta | str | Mapping[str, float]
WANTED = "DD:HH:MM:SS, HH:MM:SS, a timedelta, or {'minutes': 5}"
UNITS = ("seconds", "minutes", "hours", "days")


def seconds_of(name: str, duration: Duration) -> float:
    """``duration`` in seconds; ``name`` is the argument's.

    Raises:
        ConfigError: it is none of the forms, or not above zero.
    """
    if isinstance(duration, str):
        parts = duration.split(":")
        if len(parts) not in (3, 4) or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigError(name, duration, WANTED)
        duration = dict(zip(UNITS, map(int, reversed(parts)), strict=False))
    if isinstance(duration, Mapping):
        try:
            duration = timedelta(**duration)
        except (TypeError, OverflowError) as error:
            raise ConfigError(name, str(duration), WANTED) from error
    if duration <= timedelta(0):
        raise ConfigError(name, str(duration), "a time above zero")
    return duration.total_seconds()
