"""Logits processors of the operator's own: classes that see every request, or names that requests can ask for."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Protocol

from torch import Tensor

from common_platform.errors import ConfigError, RequestError
from servekit.sampling.parameters import SamplingParams


class LogitsProcessor(Protocol):
    """Made once a request; called before each of its tokens."""

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Tensor) -> Tensor:
        """``logits`` is ``[vocab]`` float32 and may be changed in place."""


Factory = Callable[[SamplingParams], LogitsProcessor | None]  # a class; None: this request is none of its business
_registered: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Let requests name ``factory``; entry points of the group ``servekit.logits_processors`` do the same."""
    _registered[name] = factory


def known() -> dict[str, Factory]:
    plugins = {e.name: pkgutil.resolve_name(e.value) for e in entry_points(group="servekit.logits_processors")}
    return plugins | _registered


def name_of(factory: Factory | str) -> str:
    """``module:Class``, as an engine's settings name a class in plain text; it is found by that from now on."""
    if isinstance(factory, str):
        return factory
    name = f"{factory.__module__}:{factory.__qualname__}"
    register(name, factory)
    return name


def for_all(names: Sequence[str]) -> list[Factory]:
    """The classes that an engine's settings name, as ``module:Class`` or as they were registered.

    Raises:
        ConfigError: there is no such class.
    """
    registered = known()
    found: list[Factory] = []
    for name in names:
        try:
            found.append(registered[name] if name in registered else pkgutil.resolve_name(name))
        except (ImportError, AttributeError, ValueError) as error:
            limit = "module:Class that can be imported, or a registered name"
            raise ConfigError("logits_processors", name, limit, flag="--logits-processors") from error
    return found


def make_processors(params: SamplingParams, always: Sequence[Factory] = ()) -> list[LogitsProcessor]:
    """The processors of one request: those of every request first, then those that it names.

    Raises:
        RequestError: one is not registered.
    """
    chosen = list(always)
    if params.logits_processors:
        names = known()
        for name in params.logits_processors:
            if name not in names:
                raise RequestError("logits_processors", name, f"one of {sorted(names)}", code="unsupported")
            chosen.append(names[name])
    made = (factory(params) for factory in chosen)
    return [processor for processor in made if processor is not None]
