"""The arguments that a module was made with, so that a checkpoint can make it again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from common_platform.errors import TrainingError


class AttributeDict(dict[str, Any]):
    """A dictionary whose keys are attributes too: ``hparams.lr`` is ``hparams["lr"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


class HyperParameters:
    """``save_hyperparameters`` and ``hparams``, for modules and data modules."""

    @property
    def hparams(self) -> AttributeDict:
        """What ``save_hyperparameters`` kept."""
        if "_hparams" not in self.__dict__:
            self.__dict__["_hparams"] = AttributeDict()
        return self.__dict__["_hparams"]

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of ``hparams``."""
        return AttributeDict(self.hparams)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of the ``__init__`` that calls this in ``hparams`` and in checkpoints.

        Args:
            args: the names of those that are kept, or one mapping of names to values; default: all.
            ignore: names that are left out.
            logger: whether loggers are told of them.
        """
        caller = frame or getattr(inspect.currentframe(), "f_back", None)
        if len(args) == 1 and not isinstance(args[0], str):
            given = dict(args[0]) if isinstance(args[0], Mapping) else dict(vars(args[0]))
        else:
            given = _arguments(self, caller)
            unknown = [name for name in args if name not in given]
            if unknown:
                raise TrainingError("save_hyperparameters", unknown, f"arguments of __init__: {sorted(given)}")
            given = {name: given[name] for name in args or given}
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.hparams.update({name: value for name, value in given.items() if name not in left_out})
        self.__dict__["_logs_hparams"] = logger


def _arguments(owner: object, frame: FrameType | None) -> dict[str, Any]:
    """Of the ``__init__`` in ``frame``, and of those of subclasses that called it."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        code = frame.f_code
        names = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        if not names or frame.f_locals.get(names[0]) is not owner:
            break
        values = {name: frame.f_locals[name] for name in names[1:] if name in frame.f_locals}
        if code.co_flags & inspect.CO_VARKEYWORDS:
            rest = code.co_varnames[len(names) + bool(code.co_flags & inspect.CO_VARARGS)]
            values |= frame.f_locals.get(rest, {})
        found |= values
        frame = frame.f_back
    return found
