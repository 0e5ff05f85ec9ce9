"""Scripts as Lightning's users write them, run with either library: ``python scripts.py LIBRARY FOLDER SCRIPT ...``.

Only the import differs. Each prints what it came to: losses, metrics, steps, epochs, weights, names of checkpoints.
"""

from __future__ import annotations

import csv
import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
L = importlib.import_module(sys.argv[1])
ROOT, SCRIPTS = Path(sys.argv[2]), sys.argv[3:]
callbacks = L.pytorch.callbacks
torch.set_num_threads(1)


def data(count: int = 42, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, x[:, :classes].argmax(1))


class Keeps(L.Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(outputs["loss"].item())


def trainer(name: str, **settings: Any) -> Any:
    logger = L.pytorch.loggers.CSVLogger(ROOT / name, name="log", version=0)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": logger}
    quiet |= {"devices": 1, "max_epochs": 3, "log_every_n_steps": 2, "enable_checkpointing": False}
    settings["callbacks"] = [*settings.get("callbacks", []), Keeps()]
    return L.Trainer(default_root_dir=ROOT / name, **(quiet | settings))


def outcome(fit: Any, model: nn.Module, **more: Any) -> dict[str, Any]:
    keeps = next(one for one in fit.callbacks if isinstance(one, Keeps))
    fit.logger.save()
    with Path(fit.logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("lr-")} for row in csv.DictReader(file)]
    return {
        "losses": keeps.losses,
        "metrics": {name: value.item() for name, value in sorted(fit.callback_metrics.items())},
        "steps": fit.global_step,
        "epoch": fit.current_epoch,
        "weights": [p.detach().double().sum().item() for p in model.parameters()],
        "rows": [{k: float(v) for k, v in sorted(row.items())} for row in rows if len(row) > 2],
        **more,
    }


class Classifier(L.LightningModule):
    def __init__(self, hidden: int = 8, lr: float = 0.02, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log_dict({"val_loss": F.cross_entropy(logits, y), "val_acc": (logits.argmax(1) == y).float().mean()})

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def classifier() -> dict[str, Any]:
    L.seed_everything(1)
    model = Classifier(hidden=10)
    fit = trainer("classifier", callbacks=[callbacks.LearningRateMonitor()])
    fit.fit(model, DataLoader(data(), 4, shuffle=True), DataLoader(data(15), 4))
    tested = fit.test(model, DataLoader(data(11), 4), verbose=False)
    predicted = torch.cat(fit.predict(model, DataLoader(data(11), 4))).tolist()
    fit.save_checkpoint(ROOT / "classifier" / "model.ckpt")
    again = Classifier.load_from_checkpoint(ROOT / "classifier" / "model.ckpt", **UNSAFE)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    return outcome(fit, model, tested=tested, predicted=predicted, same=same, hparams=dict(again.hparams))


UNSAFE: dict[str, Any] = {"weights_only": False} if sys.argv[1] == "lightning" else {}


class Autoencoder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return {"loss": loss, "codes": self.encoder(x)}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def autoencoder() -> dict[str, Any]:
    L.seed_everything(2)
    model = Autoencoder()
    fit = trainer("autoencoder", gradient_clip_val=0.5)
    fit.fit(model, DataLoader(data(), 5, shuffle=True))
    return outcome(fit, model)


class GAN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        real, _ = batch
        first, second = self.optimizers()
        noise = torch.randn(len(real), 3)
        self.toggle_optimizer(first)
        loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
        self.log("g_loss", loss, prog_bar=True)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self.discriminator(self.generator(noise).detach())
        loss = F.softplus(fake).mean() + F.softplus(-self.discriminator(real)).mean()
        self.log("d_loss", loss, prog_bar=True)
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(second, gradient_clip_val=0.5, gradient_clip_algorithm="value")
        second.step()
        self.untoggle_optimizer(second)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        first = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        second = torch.optim.Adam(self.discriminator.parameters(), lr=0.01)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (first, second)]


def gan() -> dict[str, Any]:
    L.seed_everything(3)
    model = GAN()
    fit = trainer("gan")
    fit.fit(model, DataLoader(data(), 6, shuffle=True))
    return outcome(fit, model)


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 16)

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] - 1)
        logits = self.head(self.block(self.embed(tokens[:, :-1]), src_mask=mask, is_causal=True))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def language_model() -> dict[str, Any]:
    L.seed_everything(4)
    tokens = torch.randint(0, 16, (32, 9), generator=torch.Generator().manual_seed(0))
    model = LanguageModel()
    fit = trainer("language_model", accumulate_grad_batches=2, gradient_clip_val=1.0, max_epochs=2)
    fit.fit(model, DataLoader(TensorDataset(tokens), 4, shuffle=True))
    return outcome(fit, model, rate=fit.optimizers[0].param_groups[0]["lr"])


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        self.train, self.val = data(30), data(12)

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)


def data_module_and_resume() -> dict[str, Any]:
    L.seed_everything(5)
    keep = callbacks.ModelCheckpoint(dirpath=ROOT / "resume" / "kept", save_last=True)
    first = trainer("resume", callbacks=[keep], max_epochs=2, enable_checkpointing=True)
    first.fit(Classifier(dropout=0.0), datamodule=Data(batch_size=5))
    model = Classifier(dropout=0.0)
    fit = trainer("resumed", max_epochs=4)
    torch.manual_seed(6)
    fit.fit(model, datamodule=Data(batch_size=5), ckpt_path=keep.best_model_path, **UNSAFE)
    tested = fit.test(model, datamodule=Data(), verbose=False)
    names = [Path(keep.best_model_path).name, Path(keep.last_model_path).name]
    return outcome(fit, model, names=names, first=first.global_step, tested=tested)


def early_stopping_and_top_k() -> dict[str, Any]:
    L.seed_everything(7)
    stop = callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.01)
    keep = callbacks.ModelCheckpoint(
        dirpath=ROOT / "top" / "kept", monitor="val_acc", mode="max", save_top_k=2, filename="{epoch}-{val_acc:.3f}"
    )
    model = Classifier(lr=0.1)
    fit = trainer("top", max_epochs=30, callbacks=[stop, keep], enable_checkpointing=True)
    fit.fit(model, DataLoader(data(), 4, shuffle=True), DataLoader(data(15), 4))
    names = sorted(path.name for path in (ROOT / "top" / "kept").iterdir())
    best = [Path(keep.best_model_path).name, keep.best_model_score.item(), stop.best_score.item(), stop.stopped_epoch]
    return outcome(fit, model, names=names, best=best)


class Writer(callbacks.BasePredictionWriter):
    def __init__(self, interval: str) -> None:
        super().__init__(interval)
        self.seen: list[Any] = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.seen.append([prediction.tolist(), list(batch_indices), batch_idx, dataloader_idx])

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.seen.append([[one.tolist() for one in predictions], [[list(i) for i in one] for one in batch_indices]])


def prediction_writer() -> dict[str, Any]:
    L.seed_everything(8)
    writer = Writer("batch_and_epoch")
    fit = trainer("writer", callbacks=[writer])
    returned = fit.predict(Classifier(), DataLoader(data(10), 4), return_predictions=False)
    return {"seen": writer.seen, "returned": returned}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(zip(*data(22).tensors, strict=True)))


def iterable_data() -> dict[str, Any]:
    L.seed_everything(9)
    model = Classifier()
    fit = trainer("stream", max_epochs=2)
    fit.fit(model, DataLoader(Stream(), 4), DataLoader(Stream(), 5))
    return outcome(fit, model)


class TwoSets(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        if dataloader_idx == 0:
            self.log("first_loss", loss, add_dataloader_idx=False, reduce_fx="max")


def several_validation_loaders() -> dict[str, Any]:
    L.seed_everything(10)
    model = TwoSets()
    loaders = [DataLoader(data(9), 4), DataLoader(data(7), 3)]
    fit = trainer("two", limit_val_batches=2)
    fit.fit(model, DataLoader(data(), 4, shuffle=True), loaders)
    validated = fit.validate(model, loaders, verbose=False)
    return outcome(fit, model, validated=validated)


class CustomStep(Classifier):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if self.trainer.global_step < 5:
            for group in optimizer.param_groups:
                group["lr"] = self.hparams.lr * (self.trainer.global_step + 1) / 5
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer):
        self.log("grad", max(p.grad.abs().max() for p in self.parameters()))


def custom_optimizer_step() -> dict[str, Any]:
    L.seed_everything(11)
    model = CustomStep()
    fit = trainer("custom", max_steps=13, max_epochs=-1)
    fit.fit(model, DataLoader(data(), 4, shuffle=True))
    return outcome(fit, model)


class WithMetrics(Classifier):
    def __init__(self) -> None:
        super().__init__()
        metrics = importlib.import_module("torchmetrics")
        self.accuracy = metrics.classification.MulticlassAccuracy(3)
        self.val_metrics = metrics.MetricCollection(
            {"acc": metrics.classification.MulticlassAccuracy(3), "f1": metrics.classification.MulticlassF1Score(3)},
            prefix="val_",
        )

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("train_acc", self.accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self.val_metrics.update(self(batch[0]), batch[1])
        self.log_dict(self.val_metrics)


def torch_metrics() -> dict[str, Any]:
    L.seed_everything(12)
    model = WithMetrics()
    fit = trainer("metrics")
    fit.fit(model, DataLoader(data(), 4, shuffle=True), DataLoader(data(15), 4))
    return outcome(fit, model)


class Plateau(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def plateau_and_limits() -> dict[str, Any]:
    L.seed_everything(13)
    model = Plateau()
    fit = trainer("plateau", max_epochs=6, limit_train_batches=0.5, val_check_interval=2, num_sanity_val_steps=1)
    fit.fit(model, DataLoader(data(), 4, shuffle=True), DataLoader(data(15), 4))
    return outcome(fit, model, rate=fit.optimizers[0].param_groups[0]["lr"])


def accumulation_by_epoch() -> dict[str, Any]:
    L.seed_everything(14)
    model = Classifier()
    schedule = callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 5})
    fit = trainer("accumulation", callbacks=[schedule])
    fit.fit(model, DataLoader(data(40), 4, shuffle=True))
    return outcome(fit, model)


class ReadsItself(Classifier):
    """Its steps read their batches themselves."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.seen: list[list[int]] = []

    def training_step(self, dataloader_iter):
        (x, y), batch_idx, dataloader_idx = next(dataloader_iter)
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.seen.append([batch_idx, dataloader_idx, self.global_step])
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append([batch_idx, len(batch[0])])

    def validation_step(self, dataloader_iter):
        (x, y), batch_idx, dataloader_idx = next(dataloader_iter)
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(x), add_dataloader_idx=False)
        self.seen.append([batch_idx, dataloader_idx])


def steps_that_read_their_batches() -> dict[str, Any]:
    L.seed_everything(15)
    model = ReadsItself()
    fit = trainer("iterator", max_epochs=2)
    fit.fit(model, DataLoader(data(), 4, shuffle=True), DataLoader(data(15), 4))
    return outcome(fit, model, seen=model.seen)


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in SCRIPTS}))
