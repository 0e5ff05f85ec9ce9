"""Run in a process of its own: every hook that a library calls, with its arguments, as JSON.

``python hook_order.py lightning FOLDER CASE ...`` and the same with ``trainkit`` print the same object: case -> calls.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
NAME, FOLDER, CASES = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
L = importlib.import_module(NAME)

COMMON = """
setup teardown on_fit_start on_fit_end on_sanity_check_start on_sanity_check_end on_train_start on_train_end
on_train_epoch_start on_train_epoch_end on_train_batch_start on_train_batch_end on_validation_start on_validation_end
on_validation_epoch_start on_validation_epoch_end on_validation_batch_start on_validation_batch_end on_test_start
on_test_end on_test_epoch_start on_test_epoch_end on_test_batch_start on_test_batch_end on_predict_start on_predict_end
on_predict_epoch_start on_predict_epoch_end on_predict_batch_start on_predict_batch_end on_before_backward
on_after_backward on_before_optimizer_step on_before_zero_grad on_save_checkpoint on_load_checkpoint
""".split()
CALLBACK = [*COMMON, "on_exception", "state_dict", "load_state_dict"]
MODULE = [
    *COMMON,
    *"""prepare_data configure_callbacks configure_model configure_optimizers configure_gradient_clipping
    optimizer_step optimizer_zero_grad backward lr_scheduler_step on_before_batch_transfer transfer_batch_to_device
    on_after_batch_transfer training_step validation_step test_step predict_step train_dataloader val_dataloader
    test_dataloader predict_dataloader on_validation_model_eval on_validation_model_train on_validation_model_zero_grad
    on_test_model_eval on_test_model_train on_predict_model_eval on_predict_model_train""".split(),
]
DATA = """prepare_data setup teardown train_dataloader val_dataloader test_dataloader predict_dataloader state_dict
load_state_dict on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer on_exception""".split()
CALLS: list[str] = []


def shown(value: Any) -> str:
    """The part of an argument that both libraries must agree on."""
    if isinstance(value, str):
        return repr(str(getattr(value, "value", value)))
    if isinstance(value, bool | int | float | type(None)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, dict):
        return "{" + " ".join(sorted(key for key in map(str, value) if key in ("loss", "state_dict"))) + "}"
    if isinstance(value, list | tuple):
        return f"[{len(value)}]"
    return next((k for k in ("Trainer", "Optimizer", "Module", "Exception") if is_a(value, k)), "object")


def is_a(value: Any, kind: str) -> bool:
    kinds = {"Trainer": L.Trainer, "Optimizer": torch.optim.Optimizer, "Module": nn.Module, "Exception": BaseException}
    return isinstance(value, kinds[kind])


def recording(who: str, names: list[str], base: type) -> type:
    """``base`` with each of the hooks written down before it runs."""

    def make(name: str):
        def hook(self, *args, **kwargs):
            arguments = [shown(value) for value in args] + [f"{k}={shown(v)}" for k, v in sorted(kwargs.items())]
            CALLS.append(f"{who}.{name}({', '.join(arguments)})")
            return getattr(super(made, self), name)(*args, **kwargs)

        return hook

    made = type(f"{base.__name__}Recorded", (base,), {name: make(name) for name in names})
    return made


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.layer(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", (self.layer(batch[0]) - batch[1]).square().mean())

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader()

    def predict_dataloader(self):
        return loader()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return [loader(), loader()]

    def test_dataloader(self):
        return loader()

    def predict_dataloader(self):
        return loader()


def loader(count: int = 12) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


class Raises(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise ValueError("no more")


RecordedNet = recording("module", MODULE, Net)
RecordedCallback = recording("callback", CALLBACK, L.Callback)
RecordedData = recording("data", DATA, Data)


class TwoLoaders(RecordedNet):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        CALLS.append(f"module.validation_step([2], {batch_idx}, {dataloader_idx})")
        self.log("val_loss", (self.layer(batch[0]) - batch[1]).square().mean())


class Manual(RecordedNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        CALLS.append(f"module.training_step([2], {batch_idx})")
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((self.layer(batch[0]) - batch[1]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01), torch.optim.SGD(self.parameters(), lr=0.001)]


class Stops(RecordedNet):
    def on_train_batch_start(self, batch, batch_idx):
        CALLS.append(f"module.on_train_batch_start([2], {batch_idx})")
        return -1 if batch_idx == 1 else None


def trainer(**settings: Any) -> Any:
    settings.setdefault("callbacks", []).insert(0, RecordedCallback())
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"devices": 1, "max_epochs": 2, "num_sanity_val_steps": 1, "enable_checkpointing": False}
    return L.Trainer(default_root_dir=FOLDER, **(quiet | settings))


class Breaks(RecordedNet):
    """Raises in one of its steps."""

    def __init__(self, step: str) -> None:
        super().__init__()
        setattr(self, step, self.breaks)

    def breaks(self, batch, batch_idx):
        raise ValueError("no more")


def failing(act: Any) -> None:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is compared
        CALLS.append(f"raised {error}" if NAME == "lightning" else f"raised {error.__cause__ or error}")


def run(case: str) -> None:
    torch.manual_seed(0)
    match case:
        case "fit":
            trainer().fit(RecordedNet())
        case "accumulate":
            trainer(accumulate_grad_batches=2, gradient_clip_val=0.5).fit(RecordedNet())
        case "mid_epoch":
            trainer(val_check_interval=2, max_epochs=1).fit(RecordedNet())
        case "max_steps":
            trainer(max_steps=4, max_epochs=-1).fit(RecordedNet())
        case "every_second":
            trainer(check_val_every_n_epoch=2, max_epochs=3).fit(RecordedNet())
        case "no_validation":
            trainer(limit_val_batches=0, limit_train_batches=2).fit(RecordedNet())
        case "reload":
            trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(RecordedNet())
        case "reload_second":
            trainer(reload_dataloaders_every_n_epochs=2, check_val_every_n_epoch=2, max_epochs=5).fit(RecordedNet())
        case "fast_dev_run":
            trainer(fast_dev_run=2).fit(RecordedNet())
        case "datamodule":
            trainer(max_epochs=1).fit(TwoLoaders(), datamodule=RecordedData())
        case "manual":
            trainer(max_epochs=1).fit(Manual())
        case "stops":
            trainer().fit(Stops())
        case "validate":
            trainer().validate(RecordedNet(), verbose=False)
        case "test":
            trainer().test(RecordedNet(), verbose=False)
        case "test_datamodule":
            trainer().test(RecordedNet(), datamodule=RecordedData(), verbose=False)
        case "predict":
            trainer().predict(RecordedNet())
        case "checkpoints":
            keep = L.pytorch.callbacks.ModelCheckpoint(FOLDER / "kept", monitor="val_loss", save_top_k=1)
            trainer(callbacks=[keep], enable_checkpointing=True).fit(RecordedNet())
        case "resume":
            first = trainer(max_epochs=1)
            first.fit(RecordedNet())
            first.save_checkpoint(FOLDER / "saved.ckpt")
            CALLS.append("resumed")
            extra = {"weights_only": False} if NAME == "lightning" else {}
            trainer(max_epochs=2).fit(RecordedNet(), ckpt_path=FOLDER / "saved.ckpt", **extra)
        case "exception":
            failing(lambda: trainer(callbacks=[Raises()]).fit(RecordedNet()))
        case "exception_step":
            failing(lambda: trainer().fit(Breaks("training_step")))
        case "exception_validation":
            failing(lambda: trainer(num_sanity_val_steps=0).fit(Breaks("validation_step")))
        case "exception_test":
            failing(lambda: trainer().test(Breaks("test_step"), datamodule=RecordedData(), verbose=False))
        case _:
            raise SystemExit(f"no case {case}")


if __name__ == "__main__":
    found = {}
    for name in CASES:
        CALLS.clear()
        run(name)
        found[name] = list(CALLS)
    print(json.dumps(found))
