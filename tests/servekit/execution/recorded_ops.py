"""A stand-in for a device's graphs: torch's operations are recorded and replayed on the very same tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOps:
    """As a graph of a device: each result is written where it was when it was recorded; Python does not run again."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, recorded in self.calls:
            found = function(*args, **kwargs)
            pairs = zip(_tensors(found), _tensors(recorded), strict=True)
            given = {t.untyped_storage().data_ptr() for t in [*_tensors(args), *_tensors(kwargs)]}
            for new, old in pairs:
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    return []


class OpsRecorder:
    """A ``Recorder`` of CPU tensors."""

    def __init__(self) -> None:
        self.num_recordings = 0
        self.names: set[str] = set()  # of all operations recorded

    def begin(self) -> None:
        graph, names = RecordedOps(), self.names
        self._graph = graph

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                names.add(function.__name__.partition(".")[0])
                graph.calls.append((function, args, kwargs or {}, out))
                return out

        self._mode = Mode()
        self._mode.__enter__()

    def end(self) -> RecordedOps:
        self._mode.__exit__(None, None, None)
        self.num_recordings += 1
        return self._graph
