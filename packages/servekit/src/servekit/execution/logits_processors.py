"""Logits processors of the operator's own, registered by name before requests can ask for them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Protocol

from torch import Tensor

from common_platform.errors import RequestError
from servekit.sampling.parameters import SamplingParams


class LogitsProcessor(Protocol):
    """Made once a request; called before each of its tokens."""

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Tensor) -> Tensor:
        """``logits`` is ``[vocab]`` float32 and may be changed in place."""


Factory = Callable[[SamplingParams], LogitsProcessor]
_registered: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Let requests name ``factory``; entry points of the group ``servekit.logits_processors`` do the same."""
    _registered[name] = factory


def known() -> dict[str, Factory]:
    plugins = {e.name: pkgutil.resolve_name(e.value) for e in entry_points(group="servekit.logits_processors")}
    return plugins | _registered


def make_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """The processors that a request names.

    Raises:
        RequestError: one is not registered.
    """
    if not params.logits_processors:
        return []
    names = known()
    for name in params.logits_processors:
        if name not in names:
            raise RequestError("logits_processors", name, f"one of {sorted(names)}", code="unsupported")
    return [names[name](params) for name in params.logits_processors]
