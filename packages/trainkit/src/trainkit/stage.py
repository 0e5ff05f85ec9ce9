"""The frame of fit, validate, test and predict: setup before, teardown after, and a clean end on errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.data.module import DataModule
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


@dataclass(slots=True)
class TrainerState:
    """What the Trainer does, or did last."""

    fn: str | None = None  # fit, validate, test, predict
    status: str = "initializing"  # initializing, running, finished, interrupted

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def stopped(self) -> bool:
        return self.status in ("finished", "interrupted")


class Stage:
    """One call of a method of the Trainer.

    Args:
        given: the loaders of each stage that the method was given.
    """

    def __init__(
        self, trainer: Trainer, model: TrainModule, name: str, given: dict[str, Any], datamodule: DataModule | None
    ) -> None:
        self._trainer, self._model, self._name = trainer, model, name
        self._given, self._datamodule = given, datamodule

    def __enter__(self) -> None:
        trainer = self._trainer
        trainer.state = TrainerState(self._name, "running")
        trainer.strategy.launch()
        trainer.enter_stage(self._model, self._name, self._given, self._datamodule)
        try:
            self._set_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _set_up(self) -> None:
        trainer, data = self._trainer, self._trainer.datamodule
        if trainer.is_nested:
            return
        if trainer.local_rank == 0:
            if data is not None:
                data.prepare_data()
            self._model.prepare_data()
        trainer.strategy.barrier("prepare_data")
        if data is not None:
            data.setup(stage=self._name)
        trainer.call("setup", stage=self._name)
        trainer.call_last("setup", stage=self._name)
        self._model.configure_model()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        trainer, data = self._trainer, self._trainer.datamodule
        problems: list[BaseException] = []
        shown = error
        if error is not None:
            shown = trainer.strategy.explained(error)
            trainer.strategy.report(shown)  # first of all: others wait
            problems += trainer.call_each("on_exception", shown)
            if data is not None:
                self._run(problems, data.on_exception, shown)
        self._run(problems, trainer.checkpoint_io.wait)
        for logger in trainer.loggers:
            self._run(problems, logger.finalize, "success" if error is None else "failed")
        if data is not None and not trainer.is_nested:
            self._run(problems, lambda: data.teardown(stage=self._name))
        if not trainer.is_nested:
            problems += trainer.call_each("teardown", stage=self._name)
        trainer.leave_stage()
        trainer.state.status = "finished" if error is None else "interrupted"
        if error is None and problems:
            raise problems[0]
        for problem in problems:  # the first error is the one that counts; the others go with it
            if shown is not None:
                shown.add_note(f"and while ending: {type(problem).__name__}: {problem}")
        if shown is not error and shown is not None:
            raise shown from shown.__cause__  # which may stand in the chain of the error itself

    @staticmethod
    def _run(problems: list[BaseException], what: Any, *arguments: Any) -> None:
        try:
            what(*arguments)
        except Exception as problem:  # noqa: BLE001 - kept, and raised or attached by the caller
            problems.append(problem)
