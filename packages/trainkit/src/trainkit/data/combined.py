"""Several loaders as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from common_platform.errors import CheckpointError, ConfigError
from trainkit.data.loaders import is_loader, num_batches_of
from trainkit.data.resumable import Resumable, StatefulLoader, TrainLoader, is_stateful

LENGTHS: dict[str, Callable[[list[float]], float]] = {  # mode -> batches of all, from those of each
    "min_size": min,
    "max_size": max,
    "max_size_cycle": max,
    "sequential": sum,
}


class CombinedLoader(Iterable[Any]):
    """Reads several loaders together, or one after the other; gives ``(batch, batch_idx, dataloader_idx)``.

    A batch has the form of ``iterables`` with a batch of each loader in it, or in "sequential" is that of one loader.

    Args:
        iterables: loaders in lists, tuples and dictionaries, nested as you like.
        mode: "min_size" ends with the shortest; "max_size" with the longest, None stands for those that are done;
            "max_size_cycle" with the longest, while the others begin again; "sequential" reads one after the other.

    Raises:
        ConfigError: there is no such mode, or no loader.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in LENGTHS:
            raise ConfigError("CombinedLoader.mode", mode, f"one of {tuple(LENGTHS)}")
        self._iterables, self._mode = iterables, mode
        self._flattened = leaves(iterables)
        if not self._flattened:
            raise ConfigError("CombinedLoader.iterables", iterables, "one loader or more")
        self._limits: list[float] | None = None
        self._reader: _Reader | None = None

    @property
    def iterables(self) -> Any:
        return self._iterables

    @property
    def mode(self) -> str:
        return self._mode

    @property
    def flattened(self) -> list[Any]:
        """All loaders in one list; may be set to others, as many."""
        return self._flattened

    @flattened.setter
    def flattened(self, loaders: list[Any]) -> None:
        if len(loaders) != len(self._flattened):
            raise ConfigError("CombinedLoader.flattened", len(loaders), f"{len(self._flattened)} loaders")
        self._flattened = list(loaders)
        self._iterables = filled(self._iterables, iter(self._flattened))

    @property
    def sampler(self) -> Any:
        """The loaders' samplers, in the form of ``iterables``."""
        return filled(self._iterables, (getattr(one, "sampler", None) for one in self._flattened))

    @property
    def batch_sampler(self) -> Any:
        """The loaders' batch samplers, in the form of ``iterables``."""
        return filled(self._iterables, (getattr(one, "batch_sampler", None) for one in self._flattened))

    @property
    def limits(self) -> list[float] | None:
        """At most so many batches of each loader; one number counts for all of them."""
        return self._limits

    @limits.setter
    def limits(self, limits: float | list[float] | None) -> None:
        count = len(self._flattened)
        given = [limits] * count if isinstance(limits, int | float) else limits
        if given is not None and len(given) != count:
            raise ConfigError("CombinedLoader.limits", len(given), f"{count}, one for each loader")
        self._limits = given

    def reader(self) -> _Reader:
        """The loaders with a position that can be saved."""
        limits = self._limits or [float("inf")] * len(self._flattened)
        cursors = [_Cursor(loader, limit) for loader, limit in zip(self._flattened, limits, strict=True)]
        return _Reader(self._mode, cursors, lambda row: filled(self._iterables, iter(row)))

    def __iter__(self) -> CombinedLoader:
        self._reader = self.reader()
        self._reader.begin(None)
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self._reader is None:
            iter(self)
        return next(self._reader)  # type: ignore[arg-type] # made just now

    def __len__(self) -> int:
        """Raises:
        TypeError: a loader that counts does not tell its length.
        """
        length = self.num_batches
        if length == float("inf"):
            raise TypeError("a CombinedLoader with loaders that do not tell their length has none")
        return int(length)

    @property
    def num_batches(self) -> float:
        """Infinite where the loaders do not tell."""
        limits = self._limits or [float("inf")] * len(self._flattened)
        return LENGTHS[self._mode]([min(num_batches_of(x), y) for x, y in zip(self._flattened, limits, strict=True)])

    def reset(self) -> None:
        """Begin anew, and let go of iterators."""
        self._reader = None


class _Cursor:
    """One of the loaders, and how far it was read."""

    def __init__(self, loader: Any, limit: float) -> None:
        self.loader: Resumable = StatefulLoader(loader) if is_stateful(loader) else TrainLoader(loader)
        self._raw, self._limit = loader, limit
        self.taken, self.rounds = 0, 0  # batches of this round, rounds that are over
        self.batches: Iterator[Any] = iter(())

    def begin(self, epoch: int | None) -> None:
        self.taken, self.rounds = 0, 0
        self._start(epoch)

    def again(self, epoch: int | None) -> None:
        self.taken, self.rounds = 0, self.rounds + 1
        self._start(epoch)

    def _start(self, epoch: int | None) -> None:
        self.batches = iter(self._raw) if epoch is None else self.loader.batches(epoch, 0)

    def next(self) -> Any:
        """Raises:
        StopIteration: it is done.
        """
        if self.taken >= self._limit:
            raise StopIteration
        batch = next(self.batches)
        self.taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "rounds": self.rounds, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken, self.rounds = state["taken"], state["rounds"]
        self.loader.load_state_dict(state["loader"])

    def go_on(self, epoch: int) -> None:
        self.batches = self.loader.batches(epoch, self.taken)


class _Reader(Iterator[tuple[Any, int, int]]):
    """One pass over the loaders."""

    def __init__(self, mode: str, cursors: list[_Cursor], form: Callable[[list[Any]], Any]) -> None:
        self._row = getattr(self, f"_{mode}")
        self._cursors, self._form, self._is_sequential = cursors, form, mode == "sequential"
        self._epoch: int | None = None
        self._index = 0  # of the next batch
        self._current = 0  # in "sequential", the loader that is read

    def begin(self, epoch: int | None) -> None:
        self._epoch, self._index, self._current = epoch, 0, 0
        for cursor in self._cursors[: 1 if self._is_sequential else None]:
            cursor.begin(epoch)

    def __next__(self) -> tuple[Any, int, int]:
        found = self._row()
        self._index += 1
        if self._is_sequential:
            return found, self._index - 1, self._current
        return self._form(found), self._index - 1, 0

    def _min_size(self) -> list[Any]:
        return [_next_of(cursor) for cursor in self._cursors]

    def _max_size(self) -> list[Any]:
        row = [_or_done(cursor) for cursor in self._cursors]
        if all(batch is DONE for batch in row):
            raise StopIteration
        return [None if batch is DONE else batch for batch in row]

    def _max_size_cycle(self) -> list[Any]:
        row = []
        for cursor in self._cursors:
            batch = _or_done(cursor)
            if batch is DONE:
                if all(other.rounds for other in self._cursors if other is not cursor):
                    cursor.rounds += 1
                    raise StopIteration
                cursor.again(self._epoch)
                batch = _next_of(cursor)
            row.append(batch)
        return row

    def _sequential(self) -> Any:
        while self._current < len(self._cursors):
            batch = _or_done(self._cursors[self._current])
            if batch is not DONE:
                return batch
            self._current, self._index = self._current + 1, 0
            if self._current < len(self._cursors):
                self._cursors[self._current].begin(self._epoch)
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        cursors = [cursor.state_dict() for cursor in self._cursors]
        return {"cursors": cursors, "index": self._index, "current": self._current}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["cursors"]) != len(self._cursors):
            raise CheckpointError("train_dataloaders", f"{len(state['cursors'])} combined loaders", "as many as there "
                                  f"are now, {len(self._cursors)}")  # fmt: skip
        self._index, self._current = state["index"], state["current"]
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)

    def go_on(self, epoch: int) -> None:
        self._epoch = epoch
        for cursor in self._cursors[self._current : self._current + 1] if self._is_sequential else self._cursors:
            cursor.go_on(epoch)


class CombinedTrainLoader:
    """A ``CombinedLoader`` as the loop reads it: each loader goes on where it stood."""

    def __init__(self, loader: CombinedLoader) -> None:
        if loader.mode == "sequential":
            raise ConfigError("CombinedLoader.mode", loader.mode, "another one for training")
        self.loader, self._reader = loader, loader.reader()

    @property
    def num_batches(self) -> float:
        return self.loader.num_batches

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        if skip:
            self._reader.go_on(epoch)
        else:
            self._reader.begin(epoch)
        return (batch for batch, _, _ in self._reader)

    def state_dict(self) -> dict[str, Any]:
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reader.load_state_dict(state)


def resumable(loader: Any) -> Resumable:
    """``loader`` as the training loop reads it."""
    if isinstance(loader, CombinedLoader):
        return CombinedTrainLoader(loader)
    return StatefulLoader(loader) if is_stateful(loader) else TrainLoader(loader)


DONE = object()


def _or_done(cursor: _Cursor) -> Any:
    try:
        return cursor.next()
    except StopIteration:
        return DONE


def _next_of(cursor: _Cursor) -> Any:
    batch = _or_done(cursor)
    if batch is DONE:
        raise StopIteration
    return batch


# --- loaders in lists, tuples and dictionaries ---


def leaves(form: Any) -> list[Any]:
    """The loaders in ``form``, from the left to the right."""
    if isinstance(form, Mapping):
        return [leaf for inner in form.values() for leaf in leaves(inner)]
    if isinstance(form, list | tuple):
        return [leaf for inner in form for leaf in leaves(inner)]
    return [form]


def filled(form: Any, values: Iterator[Any]) -> Any:
    """``form`` with the next of ``values`` in the place of each loader."""
    if isinstance(form, Mapping):
        return {key: filled(inner, values) for key, inner in form.items()}
    if isinstance(form, tuple) and hasattr(form, "_fields"):
        return type(form)(*(filled(inner, values) for inner in form))
    if isinstance(form, list | tuple):
        return type(form)(filled(inner, values) for inner in form)
    return next(values)


def are_loaders(form: Any) -> bool:
    """Whether ``form`` is a list, tuple or dictionary of loaders, and not one loader or a list of batches."""
    if not isinstance(form, list | tuple | Mapping):
        return False
    found = leaves(form)
    return bool(found) and all(is_loader(one) for one in found)
