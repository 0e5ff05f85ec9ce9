"""Every hook: its name, its arguments, and when it is called. The table is the contract; docs/hooks.md is made from it.

A hook is called on the callbacks in their order and then on the module. Callbacks that keep checkpoints come after the
module, so that what they save is whole; those that watch a metric (``EarlyStopping``) come after the module's
``on_train_epoch_end``, so that they see what it logs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from common_platform.errors import ConfigError, PlatformError, UserCodeError

BATCH = ("batch", "batch_idx")
ANY_BATCH = ("batch", "batch_idx", "dataloader_idx")  # dataloader_idx is passed where there are several loaders
OUTPUTS = ("outputs", "batch", "batch_idx")
ANY_OUTPUTS = ("outputs", "batch", "batch_idx", "dataloader_idx")
TRANSFER = ("batch", "dataloader_idx")


class Hook(NamedTuple):
    """``callback`` arguments follow (trainer, pl_module); None: such an object has no hook of that name."""

    name: str
    callback: tuple[str, ...] | None
    module: tuple[str, ...] | None
    data: tuple[str, ...] | None
    when: str


def _evaluation(stage: str, step: str) -> list[Hook]:
    """The hooks of validation, test or prediction, which differ in their names only."""
    on = f"on_{stage}"
    return [
        Hook(f"{on}_model_eval", None, (), None, "puts the module in eval mode"),
        Hook(f"{on}_start", (), (), None, f"before the first batch of {step}"),
        Hook(f"{on}_epoch_start", (), (), None, f"after {on}_start"),
        Hook(f"{on}_batch_start", ANY_BATCH, ANY_BATCH, None, f"before {step}"),
        Hook(f"{on}_batch_end", ANY_OUTPUTS, ANY_OUTPUTS, None, f"after {step}"),
        Hook(f"{on}_epoch_end", (), (), None, "after the last batch; means of it can be read"),
        Hook(f"{on}_end", (), (), None, "when everything is logged"),
        Hook(f"{on}_model_train", None, (), None, "puts every layer back in the mode it had"),
    ]


HOOKS: tuple[Hook, ...] = (
    Hook("configure_callbacks", None, (), None, "more callbacks, of the module's own"),
    Hook("prepare_data", None, (), (), "download and the like; once a machine, on its first rank"),
    Hook("setup", ("stage",), ("stage",), ("stage",), "on every rank, before the model is placed"),
    Hook("configure_model", None, (), None, "the place to make large layers"),
    Hook("on_load_checkpoint", ("checkpoint",), ("checkpoint",), None, "the state that was loaded"),
    Hook("configure_optimizers", None, (), None, "optimizers and schedulers; in fit only"),
    Hook("on_fit_start", (), (), None, "once the module is on its device"),
    Hook("on_sanity_check_start", (), None, None, "before the few validation batches that fit begins with"),
    Hook("on_sanity_check_end", (), None, None, "after them"),
    Hook("train_dataloader", None, (), (), "the training batches, where fit was given none"),
    Hook("val_dataloader", None, (), (), "the validation batches, or several loaders of them"),
    Hook("test_dataloader", None, (), (), "the batches of test"),
    Hook("predict_dataloader", None, (), (), "the batches of predict"),
    Hook("on_train_start", (), (), None, "before the first epoch"),
    Hook("on_train_epoch_start", (), (), None, "before the first batch of an epoch"),
    Hook("on_before_batch_transfer", None, TRANSFER, TRANSFER, "the batch as the loader made it; returns a batch"),
    Hook("transfer_batch_to_device", None, ("batch", "device", "dataloader_idx"), ("batch", "device", "dataloader_idx"),
         "moves it; returns a batch"),
    Hook("on_after_batch_transfer", None, TRANSFER, TRANSFER, "the batch on the device; returns a batch"),
    Hook("on_train_batch_start", BATCH, BATCH, None, "before training_step; -1 from the module's ends the epoch"),
    Hook("optimizer_step", None, ("epoch", "batch_idx", "optimizer", "optimizer_closure"), None,
         "makes the step; the closure runs all hooks from training_step to configure_gradient_clipping"),
    Hook("on_before_zero_grad", ("optimizer",), ("optimizer",), None, "after training_step, before gradients go"),
    Hook("optimizer_zero_grad", None, ("epoch", "batch_idx", "optimizer"), None, "lets gradients go"),
    Hook("on_before_backward", ("loss",), ("loss",), None, "before gradients are computed"),
    Hook("backward", None, ("loss",), None, "computes gradients"),
    Hook("on_after_backward", (), (), None, "after gradients were computed, before they are unscaled"),
    Hook("on_before_optimizer_step", ("optimizer",), ("optimizer",), None, "gradients unscaled, not clipped yet"),
    Hook("configure_gradient_clipping", None, ("optimizer", "gradient_clip_val", "gradient_clip_algorithm"), None,
         "clips gradients"),
    Hook("lr_scheduler_step", None, ("scheduler", "metric"), None, "lets a scheduler make its step"),
    Hook("on_train_batch_end", OUTPUTS, OUTPUTS, None, "after a batch"),
    Hook("on_validation_model_zero_grad", None, (), None, "frees gradients before validation inside fit"),
    *_evaluation("validation", "validation_step"),
    *_evaluation("test", "test_step"),
    *_evaluation("predict", "predict_step"),
    Hook("on_train_epoch_end", (), (), None, "after the last batch of an epoch and its validation"),
    Hook("on_save_checkpoint", ("checkpoint",), ("checkpoint",), None, "the state about to be saved; may be added to"),
    Hook("on_train_end", (), (), None, "after the last epoch"),
    Hook("on_exception", ("exception",), None, ("exception",), "when a stage is left by an exception, Ctrl-C included"),
    Hook("on_fit_end", (), (), None, "after on_train_end"),
    Hook("teardown", ("stage",), ("stage",), ("stage",), "at the very end, also after an exception"),
)  # fmt: skip
BY_NAME = {hook.name: hook for hook in HOOKS}
CALLED = tuple(hook.name for hook in HOOKS if hook.callback is not None)
Method = Callable[..., Any]


# Nothing can be saved there, so keepers of checkpoints have no call of their own.
ALWAYS_FIRST = (
    "on_sanity_check_start", "on_sanity_check_end", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step",
    *(f"on_{what}_{at}" for what in ("validation", "test", "predict") for at in ("start", "epoch_start")),
    *(f"on_{what}_batch_start" for what in ("validation", "test", "predict")),
)  # fmt: skip


class HookCaller:
    """The hooks of one stage, looked up once: a hook that nobody wrote costs nothing.

    Args:
        trainer, module: what callbacks are given.
        callbacks: in the order in which they are called.
        callback_base, module_base: the classes whose methods do nothing.
        step: says which optimizer step it is, for errors.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: list[Any],
        *,
        bases: tuple[type, type],
        step: Callable[[], int],
    ) -> None:
        self._trainer, self._module, self._step = trainer, module, step
        self._first: dict[str, list[Method]] = {}
        self._own: dict[str, Method | None] = {}
        self._watching: dict[str, list[Method]] = {}
        self._last: dict[str, list[Method]] = {}
        callback_base, module_base = bases
        for name in CALLED:
            found = [(c, _written(c, callback_base, name)) for c in callbacks]
            written = [(c, method) for c, method in found if method is not None]
            self._last[name] = [m for c, m in written if c.keeps_checkpoints and name not in ALWAYS_FIRST]
            late = name == "on_train_epoch_end"
            self._watching[name] = [m for c, m in written if late and c.watches_metrics and not c.keeps_checkpoints]
            chosen = set(map(id, self._watching[name] + self._last[name]))
            self._first[name] = [m for _, m in written if id(m) not in chosen]
            self._own[name] = _written(module, module_base, name) if BY_NAME[name].module is not None else None
        self._calls = {name: self._caller(name) for name in CALLED}
        self._last_calls = {name: self._caller_of(name, self._last[name], None, []) for name in CALLED}

    def bound(self, name: str) -> Method | None:
        """What calls a hook on the callbacks, then on the module; None where nobody wrote it.

        Its answer is the module's. It is not called on keepers of checkpoints.

        Raises:
            ConfigError: there is no such hook.
        """
        if name not in self._calls:
            raise ConfigError("hook", name, "a hook of trainkit.hooks that callbacks have")
        return self._calls[name]

    def bound_last(self, name: str) -> Method | None:
        """What calls a hook on the callbacks that keep checkpoints; None where none of them wrote it."""
        return self._last_calls[name]

    def call(self, name: str, *args: Any, **named: Any) -> Any:
        """Call a hook on the callbacks, then on the module; what the module's returned. Not on keepers of checkpoints.

        Raises:
            UserCodeError: the hook raised; the exception is its cause.
        """
        call = self.bound(name)
        return None if call is None else call(*args, **named)

    def call_last(self, name: str, *args: Any, **named: Any) -> None:
        """Call a hook on the callbacks that keep checkpoints."""
        call = self._last_calls[name]
        if call is not None:
            call(*args, **named)

    def _caller(self, name: str) -> Method | None:
        return self._caller_of(name, self._first[name], self._own[name], self._watching[name])

    def _caller_of(self, name: str, first: list[Method], own: Method | None, watching: list[Method]) -> Method | None:
        if not first and own is None and not watching:
            return None
        trainer, module = self._trainer, self._module

        def call(*args: Any, **named: Any) -> Any:
            method: Any = None
            try:
                for method in first:
                    method(trainer, module, *args, **named)
                method = own
                answer = None if own is None else own(*args, **named)
                for method in watching:
                    method(trainer, module, *args, **named)
            except (PlatformError, StopIteration):
                raise
            except Exception as error:
                raise self._blame(method, name, error) from error
            return answer

        return call

    def call_each(self, name: str, *args: Any, **named: Any) -> list[Exception]:
        """Call a hook on all, whoever raises; what was raised."""
        problems: list[Exception] = []
        own = self._own[name]
        for method in [*self._first[name], *([own] if own else []), *self._watching[name], *self._last[name]]:
            about = () if method is own else (self._trainer, self._module)
            try:
                method(*about, *args, **named)
            except PlatformError as error:
                problems.append(error)
            except Exception as error:  # noqa: BLE001 - kept, and raised or attached by the caller
                blamed = self._blame(method, name, error)
                blamed.__cause__ = error
                problems.append(blamed)
        return problems

    def _blame(self, method: Any, name: str, error: Exception) -> UserCodeError:
        owner = type(getattr(method, "__self__", self._module)).__name__
        return user_error(f"{owner}.{name}", f"step {self._step()}", error)


def user_error(where: str, when: str, error: BaseException) -> UserCodeError:
    """What is raised from ``error``, an exception of the user's own code."""
    return UserCodeError(where, message=f"{where} raised {type(error).__name__} at {when}: {error}")


def is_written(owner: Any, base: type, name: str) -> bool:
    """Whether ``owner`` has a method of its own in place of the one in ``base`` that does nothing special."""
    return _written(owner, base, name) is not None


def _written(owner: Any, base: type, name: str) -> Method | None:
    method = getattr(owner, name)
    return None if getattr(method, "__func__", None) is getattr(base, name) else method
