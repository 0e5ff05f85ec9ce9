"""Every hook: its name, its arguments, and when it is called. The table is the contract; docs/hooks.md is made from it.

A hook is called on the callbacks in their order, checkpoints last, and then on the module, if it has one of that name.
"""

from __future__ import annotations

from typing import NamedTuple


class Hook(NamedTuple):
    """``callback_args`` follow (trainer, module); ``module_args`` are what the module's own method takes."""

    name: str
    callback_args: tuple[str, ...]
    module_args: tuple[str, ...] | None  # None: callbacks only
    when: str


HOOKS: tuple[Hook, ...] = (
    Hook("setup", ("stage",), ("stage",), "before anything else, once a call of fit or validate"),
    Hook("configure_model", (), None, "on the module only: the place to make large layers"),
    Hook("on_fit_start", (), (), "once the module is on its device"),
    Hook("on_sanity_check_start", (), None, "before the few validation batches that fit begins with"),
    Hook("on_sanity_check_end", (), None, "after them"),
    Hook("on_train_start", (), (), "before the first epoch, after a checkpoint was loaded"),
    Hook("on_train_epoch_start", (), (), "before the first batch of an epoch"),
    Hook("on_train_batch_start", ("batch", "batch_idx"), ("batch", "batch_idx"), "before training_step"),
    Hook("on_before_backward", ("loss",), ("loss",), "before gradients are computed"),
    Hook("on_after_backward", (), (), "after gradients were computed, before they are clipped"),
    Hook("on_before_optimizer_step", ("optimizer",), ("optimizer",), "after clipping, before the step"),
    Hook("on_before_zero_grad", ("optimizer",), ("optimizer",), "after the step"),
    Hook("on_train_batch_end", ("outputs", "batch", "batch_idx"), ("outputs", "batch", "batch_idx"), "after a batch"),
    Hook("on_train_epoch_end", (), (), "after the last batch of an epoch and its validation"),
    Hook("on_validation_start", (), (), "before validation, the module in eval mode"),
    Hook("on_validation_epoch_start", (), (), "after on_validation_start"),
    Hook("on_validation_batch_start", ("batch", "batch_idx"), ("batch", "batch_idx"), "before validation_step"),
    Hook("on_validation_batch_end", ("outputs", "batch", "batch_idx"), ("outputs", "batch", "batch_idx"), "after it"),
    Hook("on_validation_epoch_end", (), (), "after the last validation batch, before means are taken"),
    Hook("on_validation_end", (), (), "when the validation metrics are there"),
    Hook("on_save_checkpoint", ("checkpoint",), ("checkpoint",), "the state about to be saved; may be added to"),
    Hook("on_load_checkpoint", ("checkpoint",), ("checkpoint",), "the state that was loaded"),
    Hook("on_train_end", (), (), "after the last epoch"),
    Hook("on_exception", ("exception",), None, "when fit or validate is left by an exception, Ctrl-C included"),
    Hook("on_fit_end", (), (), "after on_train_end"),
    Hook("teardown", ("stage",), ("stage",), "at the very end, also after an exception"),
)
HOOK_NAMES = frozenset(hook.name for hook in HOOKS)
ON_MODULE = frozenset(hook.name for hook in HOOKS if hook.module_args is not None)
