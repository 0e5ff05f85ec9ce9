"""What modules log: values of a step, and means of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common_platform.errors import TrainingError


@dataclass(slots=True)
class Mean:
    """A weighted mean in the making. Sums are taken on the device; nothing is read back before it is asked for."""

    total: Any = 0.0
    weight: float = 0.0
    prog_bar: bool = False
    logger: bool = True

    @property
    def value(self) -> float:
        return float(self.total) / self.weight if self.weight else float("nan")


class Results:
    """The metrics of a run."""

    def __init__(self) -> None:
        self.training = True  # which defaults of on_step and on_epoch hold
        self._step: dict[str, tuple[Any, bool, bool]] = {}  # name -> value, prog_bar, logger
        self._epochs: dict[bool, dict[str, Mean]] = {True: {}, False: {}}
        self.callback_metrics: dict[str, float] = {}
        self.progress_bar_metrics: dict[str, float] = {}

    def log(
        self,
        name: str,
        value: Tensor | float,
        *,
        weight: float,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
    ) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TrainingError(f"log({name!r})", list(value.shape), "a tensor with one element", code="user_code")
        on_step = self.training if on_step is None else on_step
        on_epoch = (not self.training) if on_epoch is None else on_epoch
        both = on_step and on_epoch
        if on_step:
            self._step[f"{name}_step" if both else name] = (value, prog_bar, logger)
        if on_epoch:
            means = self._epochs[self.training]
            mean = means.setdefault(f"{name}_epoch" if both else name, Mean(prog_bar=prog_bar, logger=logger))
            mean.total = mean.total + value * weight
            mean.weight += weight

    def take_step(self) -> dict[str, float]:
        """What the last step logged, for the loggers; the callbacks' and the bar's views are updated."""
        found: dict[str, float] = {}
        for name, (value, prog_bar, logger) in self._step.items():
            self._publish(name, float(value), prog_bar)
            if logger:
                found[name] = float(value)
        self._step.clear()
        return found

    def take_means(self) -> dict[str, float]:
        """The means of the epoch or validation that ends, for the loggers."""
        means = self._epochs[self.training]
        found = {name: mean.value for name, mean in means.items() if mean.logger}
        for name, mean in means.items():
            self._publish(name, mean.value, mean.prog_bar)
        means.clear()
        return found

    def start_validation(self) -> None:
        self.training = False
        self._epochs[False].clear()

    def end_validation(self) -> None:
        self.training = True

    def _publish(self, name: str, value: float, prog_bar: bool) -> None:
        self.callback_metrics[name] = value
        if prog_bar:
            self.progress_bar_metrics[name] = value

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch that is under way, so that a resumed one has the same means."""
        means = {n: [float(m.total), m.weight, m.prog_bar, m.logger] for n, m in self._epochs[True].items()}
        return {"means": means, "callback_metrics": dict(self.callback_metrics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epochs[True] = {name: Mean(*values) for name, values in state["means"].items()}
        self.callback_metrics = dict(state["callback_metrics"])
