"""Validation, test and prediction: every batch once, without gradients. One loop; the stage differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from common_platform.errors import PlatformError
from trainkit.data.loaders import num_batches_of
from trainkit.data_source import batches_of
from trainkit.hooks import user_error
from trainkit.loop.iterator import Numbered, StepIterator, takes_iterator
from trainkit.loop.steps import step_arguments

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation is called."""

    stage: str  # the name of Trainer's method
    hooks: str  # the middle of its hooks' names
    logs: bool

    @property
    def step(self) -> str:
        return f"{self.hooks}_step"


VALIDATION = Evaluation("validate", "validation", logs=True)
TEST = Evaluation("test", "test", logs=True)
PREDICTION = Evaluation("predict", "predict", logs=False)


def evaluate(
    trainer: Trainer, kind: Evaluation, loaders: list[Any], *, at_most: int | None = None, keep_outputs: bool = False
) -> list[list[Any]]:
    """Run ``loaders`` one after the other; what was logged goes to the loggers, but not in a sanity check.

    Args:
        at_most: batches of each loader, beside the Trainer's limit.
        keep_outputs: whether what the steps return is kept.

    Returns:
        The outputs, a list a loader.
    """
    module, results, on = trainer.module, trainer.results, f"on_{kind.hooks}"
    results.start_evaluation()
    results.refused = None if kind.logs else "prediction"
    trainer.keep_modes()
    try:
        getattr(module, f"{on}_model_eval")()
        with trainer.without_gradients():
            trainer.call(f"{on}_start")
            trainer.call(f"{on}_epoch_start")
            if takes_iterator(getattr(module, kind.step)):
                outputs = _by_iterator(trainer, kind, loaders, at_most, keep_outputs)
            else:
                outputs = [
                    list(_loader(trainer, kind, loader, index if len(loaders) > 1 else None, at_most, keep_outputs))
                    for index, loader in enumerate(loaders)
                ]
            results.loader = None
            trainer.predictions = outputs
            results.publish_means()
            trainer.call(f"{on}_epoch_end")
            trainer.call_last(f"{on}_epoch_end")
            trainer.evaluation_metrics = results.take_means() if kind.logs else {}
            if not trainer.sanity_checking:
                trainer.log_metrics(trainer.evaluation_metrics)
            trainer.call(f"{on}_end")
        trainer.call_last(f"{on}_end")
        if kind.logs:
            getattr(module, f"{on}_model_train")()
    finally:
        results.refused = None
        results.end_evaluation()
    return outputs


def _loader(
    trainer: Trainer, kind: Evaluation, loader: Any, number: int | None, at_most: int | None, keep_outputs: bool
) -> Iterator[Any]:
    """The batches of one loader; ``number`` is None where it is the only one."""
    results = trainer.results
    takes = step_arguments(getattr(trainer.module, kind.step))
    extra = () if number is None else (number,)
    for index, batch in enumerate(_limited(trainer, kind, loader, at_most)):
        batch = trainer.move(batch, number or 0)
        results.batch, results.loader = batch, number
        trainer.call(f"on_{kind.hooks}_batch_start", batch, index, *extra)
        arguments = (batch, index, number or 0)[: 3 if number is not None else 2]
        output = _step(trainer, kind, index, *arguments[:takes])
        trainer.call(f"on_{kind.hooks}_batch_end", output, batch, index, *extra)
        trainer.call_last(f"on_{kind.hooks}_batch_end", output, batch, index, *extra)
        if keep_outputs:
            yield output


def _by_iterator(
    trainer: Trainer, kind: Evaluation, loaders: list[Any], at_most: int | None, keep_outputs: bool
) -> list[list[Any]]:
    """The same for a step that reads its batches itself, those of one loader after those of the other."""
    several = len(loaders) > 1
    iterator = StepIterator(_of_all(trainer, kind, loaders, at_most))
    outputs: list[list[Any]] = [[] for _ in loaders]
    while not iterator.done:
        number = iterator.dataloader_idx
        extra = (number,) if several else ()
        trainer.results.batch, trainer.results.loader = iterator.batch, number if several else None
        trainer.call(f"on_{kind.hooks}_batch_start", iterator.batch, iterator.batch_idx, *extra)
        try:
            output = _step(trainer, kind, iterator.batch_idx, iterator)
        except StopIteration:
            break
        number = iterator.dataloader_idx
        about = (output, iterator.batch, iterator.batch_idx, *((number,) if several else ()))
        trainer.call(f"on_{kind.hooks}_batch_end", *about)
        trainer.call_last(f"on_{kind.hooks}_batch_end", *about)
        if keep_outputs:
            outputs[number].append(output)
    return outputs


def _of_all(trainer: Trainer, kind: Evaluation, loaders: list[Any], at_most: int | None) -> Iterator[Numbered]:
    lengths = [_limit(trainer, kind, loader, at_most) for loader in loaders]
    for number, loader in enumerate(loaders):
        is_last_loader = not any(lengths[number + 1 :])
        for index, batch in enumerate(_limited(trainer, kind, loader, at_most)):
            yield batch, index, number, is_last_loader and index + 1 == lengths[number]


def _limit(trainer: Trainer, kind: Evaluation, loader: Any, at_most: int | None) -> float:
    limit = trainer.limits.of(kind.stage, num_batches_of(loader))
    return limit if at_most is None else min(limit, at_most)


def _limited(trainer: Trainer, kind: Evaluation, loader: Any, at_most: int | None) -> Iterator[Any]:
    limit = _limit(trainer, kind, loader, at_most)
    return islice(_batches(trainer, batches_of(loader)), None if limit == float("inf") else int(limit))


def _step(trainer: Trainer, kind: Evaluation, index: int, *arguments: Any) -> Any:
    try:
        with trainer.precision_plugin.context(trainer.strategy.device):
            return trainer.strategy.evaluation_step(kind.step, *arguments)
    except (PlatformError, StopIteration):
        raise
    except Exception as error:
        where = f"{type(trainer.module).__name__}.{kind.step}"
        raise user_error(where, f"batch {index}", error) from error


def _batches(trainer: Trainer, loader: Any) -> Iterator[Any]:
    batches, number = iter(loader), 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise user_error("the loader", f"batch {number}, rank {trainer.global_rank}", error) from error
        yield batch
        number += 1


def by_loader(metrics: dict[str, float], loader_of: dict[str, int], count: int) -> list[dict[str, float]]:
    """The metrics of each loader, and in each those that belong to none."""
    return [{n: v for n, v in metrics.items() if loader_of.get(n, number) == number} for number in range(count)]


def inference(enabled: bool) -> Any:
    """Without gradients: torch's inference mode, or ``no_grad`` where tensors are to be used later."""
    return torch.inference_mode() if enabled else torch.no_grad()
