"""Train a part of a module first, and the rest of it later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.ranks import rank_zero_warn

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

LOGGER = logging.getLogger("trainkit")
Modules = nn.Module | Iterable[Any]


def multiplicative(epoch: int) -> float:
    """Twice as much each epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """The base of callbacks that freeze layers and train them from some epoch on.

    Override ``freeze_before_training`` to freeze, and ``finetune_function`` to unfreeze; parameter groups that are
    added to an optimizer are there again after a resume. ``configure_optimizers`` gives only what is trained from the
    start.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[dict[str, Any]]] = {}  # of each optimizer, with the names of parameters
        self._resumes = False

    def freeze_before_training(self, pl_module: TrainModule) -> None:
        """Freeze layers; called in ``setup``."""
        raise ConfigError(type(self).__name__, "no freeze_before_training", "such a method")

    def finetune_function(self, pl_module: TrainModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze layers; called when an epoch begins, for each optimizer."""
        raise ConfigError(type(self).__name__, "no finetune_function", "such a method")

    # --- what overridden methods call ---

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Those of ``modules``, however nested, that have parameters of their own or no children."""
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList | nn.Sequential):
            found = list(modules.modules())
        elif isinstance(modules, Iterable):
            found = [inner for one in modules for inner in BaseFinetuning.flatten_modules(one)]
        else:
            raise ConfigError("modules", type(modules).__name__, "a module, or several")
        return [module for module in found if not list(module.children()) or module._parameters]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of ``modules`` that are trained, or that are not; ``train_bn``: also those of batch norms."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze what ``module`` has itself, not what its children have."""
        _set_trained(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze ``modules``, but not their batch norms unless ``train_bn`` is False."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, train_bn and isinstance(module, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of ``params`` that ``optimizer`` does not have; says so where it has some."""
        has = {id(p) for group in optimizer.param_groups for p in group["params"]}
        given = list(params)
        found = [p for p in given if id(p) not in has]
        if len(found) < len(given):
            rank_zero_warn(f"{len(given) - len(found)} parameters to be unfrozen are in the optimizer already and are "
                           "left out: configure_optimizers is to give it those that need gradients only")  # fmt: skip
        return found

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Train ``modules`` from now on, as a new group of ``optimizer``.

        Args:
            lr: of the group; default: that of the first group, divided by ``initial_denom_lr``.
        """
        BaseFinetuning.make_trainable(modules)
        rate = float(optimizer.param_groups[0]["lr"]) / initial_denom_lr if lr is None else float(lr)
        params = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        if found := BaseFinetuning.filter_on_optimizer(optimizer, params):
            optimizer.add_param_group({"params": found, "lr": rate})

    # --- hooks ---

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        """Groups of the run that is gone on with are there before the optimizers' states are put back."""
        if not self._resumes:
            return
        self._resumes = False
        named = dict(pl_module.named_parameters())
        for number, optimizer in enumerate(trainer.optimizers):
            for group in self._groups.get(number, [])[len(optimizer.param_groups) :]:
                for name in group["params"]:
                    named[name].requires_grad = True
                optimizer.add_param_group({**group, "params": [named[name] for name in group["params"]]})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        for number, optimizer in enumerate(trainer.optimizers):
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            self._groups[number] = [_named(group, names) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"groups": {str(number): groups for number, groups in self._groups.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._groups = {int(number): groups for number, groups in state_dict["groups"].items()}
        self._resumes = True


class BackboneFinetuning(BaseFinetuning):
    """Trains ``module.backbone`` from an epoch on, at a rate of its own that grows from epoch to epoch.

    Args:
        unfreeze_backbone_at_epoch: before it, the backbone is frozen.
        lambda_func: epoch -> what the backbone's rate is multiplied by when that epoch begins.
        backbone_initial_ratio_lr: the backbone's first rate, as a share of the first group's.
        backbone_initial_lr: its first rate, whatever the first group's is.
        should_align: once the backbone's rate has reached the first group's, it is that.
        initial_denom_lr: taken for Lightning's sake; the two rates above say it all.
        train_bn: also train the backbone's batch norms.
        verbose: log both rates.
        rounding: digits of them.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch, self.lambda_func = unfreeze_backbone_at_epoch, lambda_func
        self.backbone_initial_ratio_lr, self.backbone_initial_lr = backbone_initial_ratio_lr, backbone_initial_lr
        self.should_align, self.initial_denom_lr, self.train_bn = should_align, initial_denom_lr, train_bn
        self.verbose, self.rounding = verbose, rounding
        self.previous_backbone_lr: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise ConfigError("BackboneFinetuning", f"{type(pl_module).__name__} without a backbone", "a module with "
                              "an attribute backbone, which is a module")  # fmt: skip
        super().on_fit_start(trainer, pl_module)

    def freeze_before_training(self, pl_module: TrainModule) -> None:
        if isinstance(getattr(pl_module, "backbone", None), nn.Module):
            self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: TrainModule, epoch: int, optimizer: Optimizer) -> None:
        rate = float(optimizer.param_groups[0]["lr"])
        if epoch == self.unfreeze_backbone_at_epoch:
            own = self.backbone_initial_lr
            own = rate * self.backbone_initial_ratio_lr if own is None else own
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, own, train_bn=self.train_bn)
        elif epoch > self.unfreeze_backbone_at_epoch and self.previous_backbone_lr is not None:
            own = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            own = rate if self.should_align and own > rate else own
            optimizer.param_groups[-1]["lr"] = own
        else:
            return
        self.previous_backbone_lr = own
        if self.verbose:
            LOGGER.info("lr %s, of the backbone %s", round(rate, self.rounding), round(own, self.rounding))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]


def _set_trained(module: nn.Module, trained: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trained
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = trained


def _named(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """``group`` with names in place of parameters."""
    plain = {key: value for key, value in group.items() if not callable(value) or isinstance(value, Tensor)}
    return {**plain, "params": [names[id(p)] for p in group["params"]]}
