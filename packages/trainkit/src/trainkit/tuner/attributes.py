"""Settings of a user's model or data module by name: as an attribute, or in ``hparams``."""

from __future__ import annotations

from typing import Any

from common_platform.errors import ConfigError


def holders(name: str, *owners: Any) -> list[Any]:
    """Those of ``owners`` that have ``name``."""
    return [owner for owner in owners if owner is not None and has(owner, name)]


def has(owner: Any, name: str) -> bool:
    return hasattr(owner, name) or name in getattr(owner, "hparams", {})


def get(owner: Any, name: str) -> Any:
    return getattr(owner, name) if hasattr(owner, name) else owner.hparams[name]


def put(owner: Any, name: str, value: Any) -> None:
    """Set ``name`` wherever ``owner`` has it."""
    if hasattr(owner, name):
        setattr(owner, name, value)
    if name in getattr(owner, "hparams", {}):
        owner.hparams[name] = value


def first_of(names: tuple[str, ...], *owners: Any) -> str:
    """The first of ``names`` that one of ``owners`` has.

    Raises:
        ConfigError: none has any.
    """
    for name in names:
        if holders(name, *owners):
            return name
    kinds = ", ".join(type(owner).__name__ for owner in owners if owner is not None)
    raise ConfigError(names[0], f"not in {kinds} or its hparams", f"an attribute or hyperparameter, one of {names}")
