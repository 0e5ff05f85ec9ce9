"""Steps that read their batches themselves, ``training_step(self, dataloader_iter)``. test_scripts.py has Lightning."""

from __future__ import annotations

import pytest
import torch
from tests.trainkit.tiny import Regression, dataset, trainer
from torch.utils.data import DataLoader, IterableDataset

from common_platform import errors
from trainkit.callbacks import BasePredictionWriter, Callback, ModelCheckpoint


class Reads(Regression):
    """Trains on the mean of ``count`` batches a step."""

    def __init__(self, count: int = 1, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.count = count
        self.read: list[int] = []
        self.validated: list[tuple[int, int]] = []

    def training_step(self, dataloader_iter):
        losses = []
        for _ in range(self.count):
            batch, batch_idx, _ = next(dataloader_iter)
            losses.append(self.loss(batch))
            self.read.append(batch_idx)
        return torch.stack(losses).mean()

    def validation_step(self, dataloader_iter):
        batch, batch_idx, dataloader_idx = next(dataloader_iter)
        self.validated.append((batch_idx, dataloader_idx))
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def predict_step(self, dataloader_iter):
        return self.net(next(dataloader_iter)[0][0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(dataset(40)))


class Ends(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch_idx)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fitted(root, module, train, **settings):
    torch.manual_seed(5)
    run = trainer(root, max_epochs=2, enable_checkpointing=False, logger=False, **settings)
    run.fit(module, train)
    return run


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_batches_a_step_are_a_loop_of_ones_own(tmp_path, accumulate):
    """10 batches in 5 steps; with 3 steps to a group the last is shorter, as the number of steps was not known."""
    torch.manual_seed(0)
    module, ends = Reads(2), Ends()
    torch.manual_seed(0)
    own = Reads(2)
    optimizer = own.configure_optimizers()
    run = fitted(tmp_path, module, DataLoader(dataset(40), 4), callbacks=[ends], accumulate_grad_batches=accumulate)
    for _ in range(2):
        batches = list(DataLoader(dataset(40), 4))
        pairs = [batches[i : i + 2] for i in range(0, 10, 2)]
        for group in (pairs[i : i + accumulate] for i in range(0, 5, accumulate)):
            optimizer.zero_grad()
            for pair in group:
                (torch.stack([own.loss(batch) for batch in pair]).mean() / len(group)).backward()
            optimizer.step()
    assert module.read == [*range(10)] * 2
    assert ends.batches == [1, 3, 5, 7, 9] * 2
    assert run.global_step == 2 * -(-5 // accumulate)
    torch.testing.assert_close(weights(module), weights(own), rtol=0, atol=1e-7 if accumulate > 1 else 0)


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_a_loader_that_ends_in_the_middle_of_a_step_ends_the_epoch(tmp_path, kind):
    """10 batches, 3 a step: the last one is read and not trained on; validation comes all the same."""
    module, ends = Reads(3), Ends()
    train = DataLoader(dataset(40) if kind == "sized" else Stream(), 4)
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=False, callbacks=[ends])
    run.fit(module, train, [DataLoader(dataset(8), 4), DataLoader(dataset(12), 4)])
    assert ends.batches == [2, 5, 8] * 2
    assert module.read == [*range(10)] * 2
    assert module.validated == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)] * 2
    assert run.global_step == 6


@pytest.mark.parametrize("kind", ["shuffled", "stream"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_run_reads_on_where_it_stood(tmp_path, kind, at):
    def loader():
        return DataLoader(dataset(40), 4, shuffle=True) if kind == "shuffled" else DataLoader(Stream(), 4)

    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.progress.total_batches == at:
                trainer.save_checkpoint(tmp_path / "middle")

    def run(callbacks, ckpt_path=None):
        torch.manual_seed(3)
        module = Reads(2, dropout=0.2)
        fit = trainer(tmp_path, max_epochs=2, enable_checkpointing=False, callbacks=callbacks)
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return module

    whole, resumed = run([Saves()]), run([], tmp_path / "middle")
    assert resumed.read == whole.read[2 * at :]
    assert torch.equal(weights(whole), weights(resumed))


def test_limits_count_steps(tmp_path):
    module = Reads(2)
    fitted(tmp_path, module, DataLoader(dataset(40), 4), limit_train_batches=2)
    assert module.read == [0, 1, 2, 3] * 2


def test_predictions_come_from_the_iterator_too(tmp_path):
    module = Reads()
    found = trainer(tmp_path).predict(module, [DataLoader(dataset(6), 4), DataLoader(dataset(3), 4)])
    assert [[len(part) for part in one] for one in found] == [[4, 2], [3]]


class Logs(Reads):
    def training_step(self, dataloader_iter):
        loss = super().training_step(dataloader_iter)
        self.log("train_loss", loss)
        return loss


class Takes(Reads):
    def training_step(self, dataloader_iter, batch_idx):
        return super().training_step(dataloader_iter)


def test_what_does_not_go_together_is_named(tmp_path):
    train = DataLoader(dataset(8), 4)
    with pytest.raises(errors.TrainingError, match=r"train_loss.*batch_size"):
        fitted(tmp_path, Logs(), train)
    with pytest.raises(errors.ConfigError, match="training_step.*dataloader_iter, batch_idx"):
        fitted(tmp_path, Takes(), train)
    with pytest.raises(errors.ConfigError, match="prefetch_to_device"):
        fitted(tmp_path, Reads(), train, prefetch_to_device=True)
    with pytest.raises(errors.ConfigError, match="Writer.*predict_step"):
        trainer(tmp_path, callbacks=[type("Writer", (BasePredictionWriter,), {})()]).predict(Reads(), train)


def test_checkpoints_are_kept_as_ever(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    run = trainer(tmp_path, max_epochs=1, callbacks=[keep])
    run.fit(Reads(2), DataLoader(dataset(40), 4))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]
