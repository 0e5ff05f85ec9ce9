"""Stands in for msgspec on a machine that has none: plain structs, which is all that an engine in one process needs.

Only `python -m tests.gpu` puts this folder on the path, and only where the real one is missing.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from . import structs

__all__ = ["DecodeError", "MsgspecError", "Struct", "ValidationError", "structs"]


class MsgspecError(Exception):
    pass


class DecodeError(MsgspecError):
    pass


class ValidationError(DecodeError):
    pass


class Struct:
    __struct_fields__: tuple[str, ...] = ()
    _positional: tuple[str, ...] = ()

    def __init_subclass__(cls, *, kw_only: bool = False, **options: Any) -> None:
        super().__init_subclass__()
        own = tuple(name for name in inspect.get_annotations(cls) if not name.startswith("__"))
        cls.__struct_fields__ = (*cls.__struct_fields__, *(name for name in own if name not in cls.__struct_fields__))
        cls._positional = cls._positional if kw_only else (*cls._positional, *own)

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self._positional, values, strict=False)) | named
        if len(values) > len(self._positional) or set(given) - set(self.__struct_fields__):
            raise TypeError(f"{type(self).__name__}: unexpected argument")
        for name in self.__struct_fields__:
            if name not in given:
                if not hasattr(type(self), name):
                    raise TypeError(f"{type(self).__name__}: missing {name}")
                given[name] = copy.copy(getattr(type(self), name))
            object.__setattr__(self, name, given[name])
        after = getattr(self, "__post_init__", None)
        if after is not None:
            after()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({fields})"
