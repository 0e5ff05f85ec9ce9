"""A profile: measured steps as JSON lines, so that it can be measured on one machine and fitted on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from common_platform.errors import ConfigError, ResourceError
from servekit.simulate.cost import StepShape

MOST = 1 << 53


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step: its shape, see ``StepShape``, and what it took."""

    tokens: int
    rows: int
    context: int
    pairs: int = 0
    seconds: float

    @property
    def shape(self) -> StepShape:
        return StepShape(self.tokens, self.rows, self.context, self.pairs)


LEAST = {"tokens": 1, "rows": 1, "context": 0, "pairs": 0}


def write_profile(path: str | Path, steps: Sequence[MeasuredStep]) -> None:
    """One line a step.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))
    except OSError as error:
        raise ResourceError("profile", str(path), f"a file that can be written ({error})", flag="--out") from error


def read_profile(path: str | Path) -> list[MeasuredStep]:
    """All steps of ``path``.

    Raises:
        ConfigError: it cannot be read, or a line is not a step; ``param`` is ``FILE:LINE`` with the field at fault.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError("profile", str(path), "a readable file") from error
    name = Path(path).name
    steps = [_step(f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not steps:
        raise ConfigError("profile", str(path), "at least one measured step")
    return steps


def _step(where: str, line: bytes) -> MeasuredStep:
    try:
        body: Any = msgspec.json.decode(line)
        step = msgspec.convert(body, MeasuredStep)
    except (msgspec.MsgspecError, UnicodeError) as error:
        fields = ", ".join(MeasuredStep.__struct_fields__)
        raise ConfigError(where, line[:64].decode("utf-8", "replace"), f"an object of {fields} ({error})") from error
    for name, low in LEAST.items():
        if not low <= getattr(step, name) <= MOST:
            raise ConfigError(f"{where}.{name}", getattr(step, name), f"an integer, {low}..{MOST}")
    if not (math.isfinite(step.seconds) and step.seconds > 0):
        raise ConfigError(f"{where}.seconds", step.seconds, "a finite number above 0")
    return step
