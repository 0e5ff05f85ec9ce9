"""Training runs for one or several ranks, as JSON: ``python ddp_program.py FOLDER DEVICES CASE ...``."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import torch
from tests.trainkit.tiny import Regression, dataset
from torch.utils.data import DataLoader, IterableDataset

import trainkit.checkpoint
from common_platform.errors import CheckpointIncomplete
from trainkit.callbacks import Callback, EarlyStopping, ModelCheckpoint
from trainkit.data import ShardedIterable

FOLDER, DEVICES, CASES = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
RANKS = 1 if DEVICES == "1" else 2
SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "clip": {"gradient_clip_val": 0.1},
    "norm": {"sync_batchnorm": True},
}


class Manual(Regression):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Weighted(Regression):
    """The batches of ranks count by their own weights."""

    def training_step(self, batch, batch_idx):
        weight = batch[0][:, 0].abs()
        loss = ((self.net(batch[0]) - batch[1]).square()[:, 0] * weight).sum() / weight.sum()
        return {"loss": loss, "weight": float(weight.sum())}


class Normed(Regression):
    """Its batch norm counts the batches of all ranks."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), self.net[2], self.net[3]
        )


class Stops(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class Stream(IterableDataset):
    """The same samples wherever it is read."""

    def __init__(self, count=60):
        self.count = count

    def __iter__(self):
        return iter(list(dataset(self.count)))


class StreamOfWorkers(Stream):
    """Each worker process reads its own part, as torch's documentation has it."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return islice(super().__iter__(), worker.id if worker else 0, None, worker.num_workers if worker else 1)


class StreamOfRanks(Stream):
    """Each rank reads its own part."""

    def __iter__(self):
        return islice(super().__iter__(), torch.distributed.get_rank(), None, torch.distributed.get_world_size())


class Claims(Stream):
    """Says that it splits itself, and does not."""

    shards_itself = True


class Uneven(IterableDataset):
    def __iter__(self):
        x, y = dataset(64).tensors
        count = 64 if trainkit.pytorch.utilities.rank_zero_only(lambda: True)() else 32
        return iter(list(zip(x[:count], y[:count], strict=True)))


class Sees(Callback):
    """The targets of all training batches."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch[1].flatten().tolist())


class Raises(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            raise ValueError("rank one gives up")


def trainer(**settings):
    quiet = {"enable_progress_bar": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "max_epochs": 2}
    quiet |= {"accelerator": "cpu", "devices": DEVICES, "default_root_dir": FOLDER, "enable_checkpointing": False}
    return trainkit.Trainer(**(quiet | settings))


def own_loop() -> dict:
    """The same training by a loop of one's own; two micro-batches to a step."""
    trainkit.seed_everything(3)
    runtime = trainkit.Runtime(accelerator="cpu", devices=DEVICES)
    runtime.launch()
    model = torch.nn.Linear(4, 1)
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    loader = runtime.setup_dataloaders(DataLoader(dataset(64), 16 // RANKS))
    for index, (x, y) in enumerate(loader):
        with runtime.no_backward_sync(model, enabled=index % 2 == 0):
            runtime.backward(torch.nn.functional.mse_loss(model(x), y) / 2)
        if index % 2:
            runtime.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
    loss = runtime.all_reduce(torch.tensor(float(runtime.global_rank + 1)), "sum").item()
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "metrics": {"ranks": loss, "told": runtime.broadcast(7 + runtime.global_rank)},
        "steps": len(loader),
        "world_size": runtime.world_size,
        "rank": runtime.global_rank,
    }


STREAMS = {"of_nobody": Stream, "of_workers": StreamOfWorkers, "of_ranks": StreamOfRanks}


def streams(case: str) -> dict:
    """One epoch over a stream of 38 samples by two workers, whole or stopped after 3 batches and gone on with."""
    kind, how = case.removeprefix("stream_").split(":")
    trainkit.seed_everything(3)
    module, sees = Regression(dropout=0.2), Sees()
    train = DataLoader(STREAMS[kind](38), 4, num_workers=2)
    stops = [Stops(3)] if how == "first" else []
    keep = ModelCheckpoint(FOLDER / (f"{kind}-whole" if how == "whole" else kind), every_n_train_steps=1)
    fit = trainer(max_epochs=1, enable_checkpointing=True, callbacks=[sees, *stops, keep])
    try:
        fit.fit(module, train, ckpt_path="last" if how == "resumed" else None)
    except KeyboardInterrupt:
        if how != "first":
            raise
    weights = torch.cat([value.detach().flatten() for value in module.state_dict().values()]).tolist()
    return {"batches": fit.strategy.gather_plain(sees.batches), "weights": weights, "rank": fit.global_rank}


def unsplit() -> dict:
    """The targets that each rank trains on without a sampler of ours."""
    sees = Sees()
    fit = trainer(max_epochs=1, use_distributed_sampler=False, callbacks=[sees])
    fit.fit(Regression(), DataLoader(dataset(8), 4))
    return {"batches": fit.strategy.gather_plain(sees.batches), "rank": fit.global_rank}


def missing() -> dict:
    """What each rank says to a checkpoint of "first" without the second rank's part."""
    fit, damaged = trainer(), FOLDER / "damaged"
    if fit.is_global_zero:
        shutil.copytree(trainkit.checkpoint.find_last(FOLDER / "checkpoints"), damaged)
        (damaged / "rank-00001.safetensors").unlink()
    fit.strategy.barrier("damage")
    try:
        fit.fit(Regression(), DataLoader(dataset(64), 8), ckpt_path=damaged)
    except CheckpointIncomplete as error:
        return {"said": fit.strategy.gather_plain(str(error)), "rank": fit.global_rank}
    raise SystemExit("a rank went on without its part")


def run(case: str) -> dict:
    if case == "missing":
        return missing()
    if case == "unsplit":
        return unsplit()
    if case == "runtime":
        return own_loop()
    if case.startswith("stream_"):
        return streams(case)
    trainkit.seed_everything(3)
    kinds = {"manual": Manual, "weighted": lambda: Weighted(dropout=0.0), "norm": Normed, "dropout": Regression}
    module = kinds.get(case, lambda: Regression(dropout=0.0 if case not in ("first", "resumed") else 0.2))()
    train = DataLoader(dataset(64), 16 // RANKS, shuffle=case in ("first", "resumed", "dropout"))
    settings = SETTINGS.get(case, {})
    if case == "stop":
        settings = {"max_epochs": 50, "callbacks": [EarlyStopping("val_loss", min_delta=0.02, patience=1)]}
    if case == "sharded":
        train = DataLoader(ShardedIterable(list(dataset(60))), 16 // RANKS)
    if case == "stream":
        train = DataLoader(Stream(), 16 // RANKS)
    if case == "unsharded":
        train = DataLoader(Claims(), 8)
    if case == "uneven":
        train = DataLoader(Uneven(), 8)
    if case == "raises":
        settings = {"callbacks": [Raises()]}
    if case in ("first", "resumed"):
        dies = [Stops(7)] if case == "first" else []
        settings = {"enable_checkpointing": True, "callbacks": [*dies, ModelCheckpoint(every_n_train_steps=1)]}
    fit = trainer(**settings)
    try:
        val = DataLoader(dataset(23, 1), 5)
        fit.fit(module, train, val, ckpt_path="last" if case == "resumed" else None)
    except KeyboardInterrupt:
        if case != "first":
            raise
    changed = [type(layer) for layer in module.net if isinstance(layer, torch.nn.BatchNorm1d)]
    if set(changed) - {torch.nn.BatchNorm1d}:
        raise SystemExit(f"a batch norm is not the user's own again: {changed}")
    state = [value.detach().float().flatten() for value in module.state_dict().values()]
    return {
        "weights": torch.cat(state).tolist(),
        "metrics": {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val")},
        "steps": fit.global_step,
        "world_size": fit.world_size,
        "rank": fit.global_rank,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {case: run(case) for case in CASES}
    if found[CASES[0]]["rank"] == 0:
        print(json.dumps(found))
