"""The part of ``msgspec.structs`` that the engine calls."""

from __future__ import annotations

from typing import Any


def replace(struct: Any, /, **changes: Any) -> Any:
    return type(struct)(**({name: getattr(struct, name) for name in struct.__struct_fields__} | changes))
