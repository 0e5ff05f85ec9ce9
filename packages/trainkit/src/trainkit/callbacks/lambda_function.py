"""Callbacks from functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.hooks import CALLED


class LambdaCallback(Callback):
    """A function a hook: ``LambdaCallback(on_train_end=lambda trainer, module: print("done"))``.

    Raises:
        ConfigError: there is no hook of a name.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in CALLED:
                raise ConfigError("LambdaCallback", name, "a hook of trainkit.hooks that callbacks have")
            if function is not None:
                setattr(self, name, function)
