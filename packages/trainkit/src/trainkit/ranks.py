"""What only the first rank does."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
LOGGER = logging.getLogger("trainkit")


def rank_zero_only(function: Callable[P, R]) -> Callable[P, R | None]:
    """``function`` on the first rank; nothing, and None, on the others."""

    @functools.wraps(function)
    def on_first(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if int(os.environ.get("RANK", "0")) == 0 else None

    return on_first


@rank_zero_only
def rank_zero_info(message: object) -> None:
    """A line in the log of the first rank."""
    LOGGER.info("%s", message)


@rank_zero_only
def rank_zero_warn(message: str, stacklevel: int = 3) -> None:
    """A warning on the first rank."""
    warnings.warn(message, stacklevel=stacklevel)
