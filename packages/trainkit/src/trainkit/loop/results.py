"""What modules log: values of a step, and means of an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common_platform.errors import CollectiveMismatch, TrainingError

REDUCTIONS = ("mean", "sum", "min", "max")
START = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}


@dataclass(slots=True)
class Entry:
    """One name that is logged. Sums are taken on the device; nothing is read back before it is asked for."""

    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    reduce: str
    only_first_rank: bool = False
    metric: Any = None  # of torchmetrics
    value: Any = None  # of the newest step: a tensor, or what a float32 on the CPU holds until it is published
    is_new: bool = False  # not published yet
    is_due: bool = False  # not in a row of the log yet
    total: Any = None  # on_epoch only
    weight: float = 0.0

    def add(self, value: Tensor, weight: float) -> None:
        if self.total is None:
            self.total = torch.tensor(START[self.reduce], dtype=value.dtype, device=value.device)
        match self.reduce:
            case "mean":
                self.total = self.total + value * weight
                self.weight += weight
            case "sum":
                self.total = self.total + value
            case "min":
                self.total = torch.minimum(self.total, value)
            case "max":
                self.total = torch.maximum(self.total, value)

    def result(self) -> Tensor:
        if self.metric is not None:
            return self.metric.compute()
        if self.reduce == "mean":
            return self.total / self.weight if self.weight else torch.full_like(self.total, float("nan"))
        return self.total


class Results:
    """The metrics of a run.

    Args:
        strategy: reduces over ranks.
    """

    def __init__(self, strategy: Any = None) -> None:
        self._strategy = strategy
        self._training: dict[str, Entry] = {}
        self._evaluation: dict[str, Entry] = {}
        self.evaluating = False
        self.in_batch = False  # whether a value is of one step by default
        self.refused: str | None = None  # where nothing can be logged
        self.needs_weight = False  # where a step reads its batches itself, so that their size is not known
        self.loader: int | None = None  # the number of the loader, where there are several
        self.loader_of: dict[str, int] = {}  # what was logged for one of several loaders
        self.batch: Any = None
        self._callback: dict[str, Tensor] = {}
        self.logged_metrics: dict[str, Tensor] = {}
        self._progress_bar: dict[str, Tensor] = {}

    # --- what modules call ---

    def log(
        self,
        name: str,
        value: Any,
        weight: float | None,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce: str,
        sync_step: bool,
        by_loader: bool,
        only_first_rank: bool,
    ) -> None:
        """See ``TrainModule.log``.

        Raises:
            TrainingError: it is no number, is reduced in an unknown way, or cannot be logged here.
        """
        if self.refused is not None:
            raise TrainingError(f"log({name!r})", self.refused, "a hook of training, validation or test")
        if self.needs_weight and weight is None:
            raise TrainingError(f"log({name!r})", "no batch_size", "log(..., batch_size=n) in a training_step of "
                                "dataloader_iter", code="user_code")  # fmt: skip
        entries = self._evaluation if self.evaluating else self._training
        key = f"{name}/dataloader_idx_{self.loader}" if self.loader is not None and by_loader else name
        entry = entries.get(key)
        if entry is None:
            step = (self.in_batch and not self.evaluating) if on_step is None else on_step
            epoch = (self.evaluating or not self.in_batch) if on_epoch is None else on_epoch
            if self.loader is not None:
                self.loader_of |= {key: self.loader, f"{key}_epoch": self.loader}
            entry = entries[key] = _entry(name, step, epoch, prog_bar, logger, reduce, only_first_rank)
        if not isinstance(value, Tensor):
            if hasattr(value, "compute") and hasattr(value, "reset"):
                self._log_metric(entry, value)
                return
            value = torch.tensor(value, dtype=torch.get_default_dtype())
        elif value.numel() != 1:
            raise TrainingError(f"log({name!r})", list(value.shape), "a tensor with one element", code="user_code")
        if entry.on_step and not sync_step and not entry.on_epoch and value.is_cpu and value.dtype is torch.float32:
            entry.value = value.item()  # the same number; half the time of a tensor of its own
            entry.is_new = entry.is_due = True
            return
        value = _number(value)
        if entry.on_step:
            entry.value = self._strategy.reduce(value, reduce) if sync_step else value
            entry.is_new = entry.is_due = True
        if entry.on_epoch:
            entry.add(value, (batch_size_of(self.batch) if weight is None else weight) if reduce == "mean" else 1)

    def _log_metric(self, entry: Entry, metric: Any) -> None:
        entry.metric = metric
        if entry.on_step and metric._forward_cache is not None:
            entry.value, entry.is_new, entry.is_due = _number(metric._forward_cache), True, True

    # --- what callbacks see ---

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of each name, as tensors without dims."""
        self._publish_steps()
        return self._callback

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        self._publish_steps()
        return {name: float(value) for name, value in self._progress_bar.items()}

    def clear(self) -> None:
        """Forget what was published, after a sanity check."""
        self._callback.clear()
        self.logged_metrics.clear()
        self._progress_bar.clear()

    def _publish_steps(self) -> None:
        for entries in (self._training, self._evaluation):
            for name, entry in entries.items():
                if entry.is_new:
                    entry.is_new = False
                    if isinstance(entry.value, float):
                        entry.value = torch.tensor(entry.value, dtype=torch.float32)
                    self._publish(name, f"{name}_step" if entry.on_epoch else name, entry, entry.value)

    def _publish(self, name: str, shown: str, entry: Entry, value: Tensor) -> None:
        self._callback[name] = self._callback[shown] = value
        if entry.prog_bar:
            self._progress_bar[shown] = value
        if entry.logger:
            self.logged_metrics[shown] = value

    # --- what the loops call ---

    def take_step(self) -> dict[str, float]:
        """What was logged since the last row, for the loggers."""
        self._publish_steps()
        found = {}
        for name, entry in self._training.items():
            if entry.is_due and entry.logger:
                found[f"{name}_step" if entry.on_epoch else name] = float(entry.value)
            entry.is_due = False
        return found

    def publish_means(self) -> None:
        """Let callbacks see the means of the epoch or evaluation that ends."""
        if not self._shares_ranks:  # with several ranks once, at the end: each time is a collective
            self._means(reset=False)

    def take_means(self) -> dict[str, float]:
        """The means of the epoch or evaluation that ends, for the loggers."""
        return {name: float(value) for name, value in self._means(reset=True).items()}

    def _means(self, *, reset: bool) -> dict[str, Tensor]:
        self._publish_steps()
        entries = self._evaluation if self.evaluating else self._training
        ending = {
            name: e for name, e in entries.items() if e.on_epoch and (e.metric is not None or e.total is not None)
        }
        if reset and self._shares_ranks:
            self._reduce_over_ranks(ending)
        found = {}
        for name, entry in ending.items():
            value, shown = entry.result(), f"{name}_epoch" if entry.on_step else name
            self._publish(name, shown, entry, value)
            if entry.logger:
                found[shown] = value
            if reset and entry.metric is not None:
                entry.metric.reset()
        if reset:
            entries.clear()
        return found

    @property
    def _shares_ranks(self) -> bool:
        return self._strategy is not None and self._strategy.world_size > 1

    def _reduce_over_ranks(self, entries: Mapping[str, Entry]) -> None:
        """Means and sums as if one rank had logged everything.

        Raises:
            CollectiveMismatch: the ranks logged different names.
        """
        shared = {n: e for n, e in sorted(entries.items()) if e.metric is None and not e.only_first_rank}
        digest = hashlib.sha256("\n".join(shared).encode()).digest()[:6]
        mine = torch.tensor([float(int.from_bytes(digest, "big"))], dtype=torch.float64)
        highest, lowest = self._strategy.reduce(mine, "max"), self._strategy.reduce(mine, "min")
        if not torch.equal(highest, lowest):
            raise CollectiveMismatch("log", sorted(shared), "the same names on every rank, or rank_zero_only=True")
        for kind in ("sum", "min", "max"):
            chosen = [e for e in shared.values() if (e.reduce if e.reduce != "mean" else "sum") == kind]
            if not chosen:
                continue
            numbers = [torch.stack([e.total.double().cpu(), torch.tensor(e.weight).double()]) for e in chosen]
            reduced = self._strategy.reduce(torch.stack(numbers), kind)
            for entry, (total, weight) in zip(chosen, reduced, strict=True):
                entry.total, entry.weight = total.to(entry.total.dtype), float(weight)

    def start_evaluation(self) -> None:
        self.evaluating = True
        self._evaluation.clear()
        self.loader_of.clear()

    def end_evaluation(self) -> None:
        self.evaluating, self.loader, self.batch = False, None, None

    # --- resuming ---

    def state_dict(self, name_of_metric: Callable[[Any], str | None]) -> dict[str, Any]:
        """The sums of the epoch that is under way, so that a resumed one has the same means."""
        self._publish_steps()
        return {
            "training": {name: _saved(entry, name_of_metric) for name, entry in self._training.items()},
            "callback_metrics": dict(self._callback),
            "progress_bar_metrics": dict(self._progress_bar),
            "logged_metrics": dict(self.logged_metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` found; ``metrics`` are the module's parts by their names."""
        self._training = {
            name: Entry(**fields | {"metric": metrics.get(fields["metric"])})
            for name, fields in state["training"].items()
            if fields["metric"] is None or fields["metric"] in metrics
        }
        self._callback = dict(state["callback_metrics"])
        self._progress_bar = dict(state["progress_bar_metrics"])
        self.logged_metrics = dict(state["logged_metrics"])


def batch_size_of(batch: Any) -> int:
    """The first dim of the first tensor in ``batch``; 1 where there is none."""
    found = _first_size(batch)
    return 1 if found is None else found


def _first_size(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else 1
    if isinstance(batch, list | tuple):
        for one in batch:
            size = _first_size(one)
            if size is not None:
                return size
        return None
    if isinstance(batch, Mapping):
        return _first_size(list(batch.values()))
    return len(batch) if isinstance(batch, str) else None


def _number(value: Tensor) -> Tensor:
    value = value.detach().reshape(())
    return value.clone() if value.dtype in (torch.float32, torch.float64) else value.float()


def _entry(
    name: str, on_step: bool, on_epoch: bool, prog_bar: bool, logger: bool, reduce: str, only_first_rank: bool
) -> Entry:
    if reduce not in REDUCTIONS:
        raise TrainingError(f"log({name!r}, reduce_fx)", reduce, f"one of {REDUCTIONS}", code="user_code")
    return Entry(on_step, on_epoch, prog_bar, logger, reduce, only_first_rank)


def _saved(entry: Entry, name_of_metric: Callable[[Any], str | None]) -> dict[str, Any]:
    saved = {name: getattr(entry, name) for name in Entry.__slots__}
    return saved | {"metric": None if entry.metric is None else name_of_metric(entry.metric)}
