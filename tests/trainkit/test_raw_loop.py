"""The Trainer's numbers are those of a plain loop, bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainkit.tiny import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import trainkit
from trainkit.callbacks import Callback

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


class Regressor(trainkit.TrainModule):
    def __init__(self, net: nn.Module, make_optimizer, make_scheduler=None, interval: str = "step") -> None:
        super().__init__()
        self.net, self.make_optimizer, self.make_scheduler, self.interval = (
            net,
            make_optimizer,
            make_scheduler,
            interval,
        )

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Attention(nn.Module):
    """A transformer block over four tokens of four dims."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.block(x.view(-1, 4, 4)).flatten(1))


class GPT(nn.Module):
    """Token and place embeddings, two blocks that look back only, and a tied head: the next of sixteen tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 8), nn.Embedding(15, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        tokens = (x * 4).long().clamp(-8, 7) + 8  # [batch, 16]
        seen = self.tokens(tokens[:, :-1]) + self.places.weight
        hidden = self.blocks(seen, mask=nn.Transformer.generate_square_subsequent_mask(15), is_causal=True)
        losses = F.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(x), -1).mean(1, keepdim=True)


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)
    ),
    "transformer": Attention,
    "gpt": GPT,
}


def data(count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=generator)
    return TensorDataset(x, x.mean(1, keepdim=True))


class Losses(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def plain_loop(module: Regressor, loader, *, epochs: int, accumulate: int, clip: float | None, interval: str) -> list:
    optimizer = module.make_optimizer(module.parameters())
    scheduler = module.make_scheduler(optimizer) if module.make_scheduler else None
    losses = []
    for _ in range(epochs):
        batches = len(loader)
        for index, (x, y) in enumerate(loader):
            group = min(accumulate, batches - index // accumulate * accumulate)
            loss = F.mse_loss(module.net(x), y) / group
            if index % accumulate == 0:
                optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if (index + 1) % accumulate == 0 or index + 1 == batches:
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                if scheduler and interval == "step":
                    scheduler.step()
        if scheduler and interval == "epoch":
            scheduler.step()
    return losses


SCHEDULERS = {
    None: None,
    "step": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40),
    "epoch": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("accumulate", "clip", "interval"),
    [(1, None, None), (1, 0.1, "step"), (2, None, "epoch"), (4, 0.1, "step"), (5, None, None)],
)
def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path, net, accumulate, clip, interval):
    torch.manual_seed(0)
    ours = Regressor(NETS[net](), lambda p: ADAMW(p, lr=0.01), SCHEDULERS[interval], interval or "step")
    theirs = copy.deepcopy(ours)
    losses = Losses()
    fit = trainer(
        tmp_path,
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
    )
    torch.manual_seed(5)
    fit.fit(ours, DataLoader(data(), 6, shuffle=True))
    torch.manual_seed(5)
    wanted = plain_loop(
        theirs, DataLoader(data(), 6, shuffle=True), epochs=3, accumulate=accumulate, clip=clip, interval=interval
    )
    assert losses.seen == wanted
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


class GAN(trainkit.TrainModule):
    """Two networks, two optimizers of different kinds, and manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, 16), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        noise = torch.randn(len(batch[0]), 2)
        with first.toggle_model():
            loss = -self.critic(self.generator(noise)).mean()
            self.manual_backward(loss)
            first.step()
            first.zero_grad()
        if batch_idx % 2 == 0:
            self.toggle_optimizer(second)
            other = (self.critic(self.generator(noise).detach()) - self.critic(batch[0])).mean()
            self.manual_backward(other)
            self.clip_gradients(second, 0.5, "norm")
            second.step()
            second.zero_grad()
            self.untoggle_optimizer(second)
        self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        first, second = ADAMW(self.generator.parameters(), lr=0.01), SGD(self.critic.parameters(), lr=0.1, momentum=0.5)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]


def plain_gan(module: GAN, loader, epochs: int) -> None:
    (first, second), (scheduler,) = module.configure_optimizers()
    for _ in range(epochs):
        for index, (x, _) in enumerate(loader):
            noise = torch.randn(len(x), 2)
            first.zero_grad()
            (-module.critic(module.generator(noise)).mean()).backward()
            first.step()
            if index % 2 == 0:
                second.zero_grad()
                (module.critic(module.generator(noise).detach()) - module.critic(x)).mean().backward()
                nn.utils.clip_grad_norm_(module.critic.parameters(), 0.5)
                second.step()
            scheduler.step()


def test_manual_optimization_of_a_gan_is_the_plain_loop(tmp_path):
    torch.manual_seed(0)
    ours = GAN()
    theirs = copy.deepcopy(ours)
    fit = trainer(tmp_path, max_epochs=2, logger=False, enable_checkpointing=False)
    torch.manual_seed(1)
    fit.fit(ours, DataLoader(data(), 6, shuffle=True))
    torch.manual_seed(1)
    plain_gan(theirs, DataLoader(data(), 6, shuffle=True), 2)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad
    assert fit.global_step == 2 * (8 + 4)


class Several(trainkit.TrainModule):
    """Two parts with optimizers and schedulers of their own, which step in turns, one of them after two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.Tanh()), nn.Linear(8, 1)
        self.losses: list[float] = []

    def loss(self, batch):
        return F.mse_loss(self.head(self.body(batch[0])), batch[1])

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        first, second = self.lr_schedulers()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        head.step()
        head.zero_grad()
        second.step()
        if batch_idx % 2:
            self.clip_gradients(body, 0.05, "value")
            body.step()
            body.zero_grad()
        if self.trainer.is_last_batch:
            first.step()

    def configure_optimizers(self):
        body, head = ADAMW(self.body.parameters(), lr=0.01), SGD(self.head.parameters(), lr=0.1, momentum=0.9)
        rates = torch.optim.lr_scheduler
        return [body, head], [rates.StepLR(body, 1, 0.5), rates.ExponentialLR(head, 0.95)]


def test_several_optimizers_and_schedulers_are_the_plain_loop(tmp_path):
    torch.manual_seed(0)
    ours = Several()
    theirs = copy.deepcopy(ours)
    fit = trainer(tmp_path, max_epochs=3, logger=False, enable_checkpointing=False)
    torch.manual_seed(1)
    fit.fit(ours, DataLoader(data(), 6, shuffle=True))
    torch.manual_seed(1)
    (body, head), (first, second) = theirs.configure_optimizers()
    loader, losses = DataLoader(data(), 6, shuffle=True), []
    for _ in range(3):
        for index, batch in enumerate(loader):
            loss = theirs.loss(batch)
            losses.append(loss.item())
            loss.backward()
            head.step()
            head.zero_grad()
            second.step()
            if index % 2:
                nn.utils.clip_grad_value_(theirs.body.parameters(), 0.05)
                body.step()
                body.zero_grad()
        first.step()
    assert ours.losses == losses
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=20, deadline=None)
@given(batches=st.integers(1, 9), group=st.integers(1, 5), size=st.integers(1, 4), sized=st.booleans())
def test_accumulated_batches_step_like_large_ones(tmp_path_factory, batches, group, size, sized):
    """Also where the last group is short, and where the loader does not tell its length."""
    x = torch.randn(batches * size, 16, generator=torch.Generator().manual_seed(2))
    y = x.mean(1, keepdim=True)
    found = []
    for accumulate, rows in ((group, size), (1, size * group)):
        parts = list(zip(x.split(rows), y.split(rows), strict=True))
        torch.manual_seed(0)
        module = Regressor(nn.Linear(16, 1), lambda p: SGD(p, lr=0.1))
        loader = parts if sized else _Unsized(parts)
        fit = trainer(
            tmp_path_factory.mktemp("runs"),
            max_epochs=2,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
        )
        fit.fit(module, loader)
        assert fit.global_step == 2 * -(-batches // group)
        found.append([p.detach() for p in module.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class _Unsized:
    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_lbfgs_calls_its_closure_as_often_as_it_likes(tmp_path):
    torch.manual_seed(0)
    module = Regressor(nn.Linear(16, 1), lambda p: torch.optim.LBFGS(p, max_iter=10, line_search_fn="strong_wolfe"))
    losses = Losses()
    x, y = data().tensors
    fit = trainer(tmp_path, max_epochs=3, callbacks=[losses], logger=False, enable_checkpointing=False)
    fit.fit(module, [(x, y)])
    assert losses.seen[-1] < 1e-3
    assert fit.global_step == 3


def test_a_custom_optimizer_step_may_leave_steps_out(tmp_path):
    class Every(Regressor):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    torch.manual_seed(0)
    fit = trainer(tmp_path, max_epochs=1, logger=False, enable_checkpointing=False)
    fit.fit(Every(nn.Linear(16, 1), lambda p: SGD(p, lr=0.1)), DataLoader(data(), 6))
    assert fit.global_step == 4


def test_sixteen_bit_mixed_skips_steps_that_overflow_and_their_scheduler(tmp_path):
    class Overflows(Regressor):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx).float()
            return loss * (1e30 if batch_idx == 2 else 1.0)

    module = Overflows(nn.Linear(16, 1), lambda p: SGD(p, lr=0.1), SCHEDULERS["step"])
    fit = trainer(tmp_path, max_epochs=1, precision="16-mixed", logger=False, enable_checkpointing=False)
    fit.fit(module, DataLoader(data(), 6))
    assert fit.global_step == 8
    scale = fit.precision_plugin.scaler.get_scale()
    overflows = 16 - math.log2(scale)
    assert overflows >= 1
    assert fit.schedulers[0].scheduler.last_epoch == 8 - overflows
    fit.save_checkpoint(tmp_path / "saved")
    again = trainer(tmp_path, max_epochs=1, precision="16-mixed", logger=False, enable_checkpointing=False)
    again.fit(module, DataLoader(data(), 6), ckpt_path=tmp_path / "saved")
    assert again.precision_plugin.scaler.get_scale() == scale
