"""Names of metrics and settings as services want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def prefixed(metrics: Mapping[str, float], prefix: str) -> Iterator[tuple[str, float]]:
    """Each name with ``prefix`` and a "-" in front, where there is one."""
    for name, value in metrics.items():
        yield (f"{prefix}-{name}" if prefix else name), value


def flattened(params: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Mappings in mappings as one, with "/" between the names."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        full = f"{above}/{name}" if above else str(name)
        found |= flattened(value, full) if isinstance(value, Mapping) else {full: value}
    return found
