"""The names that a library offers, as JSON: ``python names.py LIBRARY``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import sys
import tempfile
import warnings
from typing import Any

import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
L = importlib.import_module(sys.argv[1])
MODULES = (
    "core trainer callbacks loggers profilers strategies plugins plugins.io tuner cli utilities.types "
    "utilities.rank_zero "
    "utilities.combined_loader utilities.exceptions utilities.grads utilities.seed callbacks.early_stopping "
    "callbacks.model_checkpoint callbacks.lr_monitor callbacks.progress callbacks.timer callbacks.prediction_writer "
    "callbacks.stochastic_weight_avg callbacks.model_summary callbacks.lambda_function callbacks.finetuning "
    "callbacks.gradient_accumulation_scheduler callbacks.device_stats_monitor loggers.logger loggers.csv_logs "
    "loggers.tensorboard loggers.mlflow loggers.wandb"
).split()


def public(owner: Any) -> list[str]:
    return sorted(name for name in dir(owner) if not name.startswith("_"))


def arguments(function: Any) -> list[str]:
    with contextlib.suppress(TypeError, ValueError):
        kinds = inspect.signature(function).parameters.values()
        return [
            p.name for p in kinds if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "cls")
        ]
    return []


def described(kind: type, instance: Any = None) -> dict[str, Any]:
    names = public(kind if instance is None else instance)
    methods = {name: arguments(getattr(kind, name)) for name in public(kind) if callable(getattr(kind, name))}
    return {"names": names, "methods": methods, "constructor": arguments(kind.__init__)}


def callbacks() -> dict[str, list[str]]:
    found = L.pytorch.callbacks
    names = [name for name in public(found) if name[0].isupper()]
    return {name: arguments(getattr(found, name).__init__) for name in names if inspect.isclass(getattr(found, name))}


def modules() -> list[str]:
    there = []
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{sys.argv[1]}.pytorch.{name}")
            there.append(name)
    return there


if __name__ == "__main__":
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=tempfile.mkdtemp(), **quiet)
    trainer_names = described(L.Trainer)
    trainer_names["names"] = sorted({*trainer_names["names"], *(n for n in vars(trainer) if not n.startswith("_"))})
    module = L.LightningModule()
    of_module = described(L.LightningModule)
    own = {*of_module["names"], *(name for name in vars(module) if not name.startswith("_"))}
    of_module["names"] = sorted(own - set(public(torch.nn.Module())))
    found = {
        "Trainer": trainer_names,
        "LightningModule": of_module,
        "LightningDataModule": described(L.LightningDataModule),
        "Callback": described(L.Callback),
    }
    print(json.dumps({"classes": found, "callbacks": callbacks(), "modules": modules()}))
