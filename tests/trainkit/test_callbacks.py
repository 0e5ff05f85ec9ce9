"""What callbacks promise: averages, files, tables, times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, loaders, trainer
from torch import nn

from common_platform.errors import ConfigError, UserCodeError
from trainkit import checkpoint
from trainkit.callbacks import (
    EMA,
    Callback,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichModelSummary,
    StochasticWeightAveraging,
    Timer,
)
from trainkit.callbacks.model_summary import summary


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@given(start=st.sampled_from([1, 2, 4, 0.5, 0.0]))
@settings(max_examples=5, deadline=None)
def test_swa_gives_the_mean_of_the_weights_that_the_last_epochs_began_with(tmp_path_factory, start):
    seen = []
    look = LambdaCallback(on_train_epoch_start=lambda trainer, module: seen.append(flat(module)))
    torch.manual_seed(0)
    module = Regression(dropout=0.0)
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=start)
    settings_ = {"max_epochs": 4, "callbacks": [look, average], "logger": False, "enable_checkpointing": False}
    trainer(tmp_path_factory.mktemp("swa"), **settings_).fit(module, loaders()[0])
    first = max(start - 1, 0) if isinstance(start, int) else int(4 * start)
    torch.testing.assert_close(flat(module), torch.stack(seen[first:]).mean(0))


def test_swa_renews_the_statistics_of_batch_norms(tmp_path):
    class Normed(Regression):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

        def forward(self, x):
            return self.net(x)

    module = Normed()
    train = loaders()[0]
    fit = trainer(tmp_path, max_epochs=2, callbacks=[StochasticWeightAveraging(0.1, 1)], enable_checkpointing=False)
    fit.fit(module, train)
    rows = train.dataset.tensors[0]
    torch.testing.assert_close(module.net[0].running_mean, rows.mean(0), rtol=1e-4, atol=1e-5)


def test_ema_is_the_recurrence_and_validation_sees_it(tmp_path):
    weights, validated = [], []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights.append(flat(pl_module))

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            validated.append(flat(pl_module))

    module = Regression()
    fit = trainer(tmp_path, max_epochs=2, callbacks=[EMA(0.8), Look()], enable_checkpointing=False)
    fit.fit(module, *loaders())
    average, after = weights[0], []
    for now in weights[1:]:
        average = 0.8 * average + 0.2 * now
        after.append(average)
    torch.testing.assert_close(flat(module), average)
    torch.testing.assert_close(validated[0], after[6])
    assert not torch.equal(weights[8], validated[0])


AVERAGES = {"ema": lambda: EMA(0.9), "swa": lambda: StochasticWeightAveraging(0.3, 2, annealing_epochs=2)}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("at", [5, 8, 16, 19])
def test_averages_resume_exactly(tmp_path, average, at):
    def run(callbacks, ckpt_path=None):
        torch.manual_seed(0)
        module = Regression()
        fit = trainer(tmp_path, max_epochs=4, callbacks=[AVERAGES[average](), *callbacks], enable_checkpointing=False)
        fit.fit(module, *loaders(), ckpt_path=ckpt_path)
        return flat(module)

    def save(trainer, module, *args):
        if trainer.global_step == at:
            trainer.save_checkpoint(tmp_path / "middle")

    whole = run([LambdaCallback(on_train_batch_end=save)])
    assert torch.equal(whole, run([], tmp_path / "middle"))


def test_swa_anneals_to_its_rate(tmp_path):
    rates = []
    look = LambdaCallback(on_train_batch_end=lambda trainer, *args: rates.append(trainer.learning_rate))
    average = StochasticWeightAveraging(0.5, 2, annealing_epochs=2, annealing_strategy="linear")
    fit = trainer(tmp_path, max_epochs=5, limit_train_batches=2, callbacks=[average, look], enable_checkpointing=False)
    fit.fit(Regression(), loaders()[0])
    before = 0.01 * 0.9
    assert rates[2::2] == pytest.approx([before, (before + 0.5) / 2, 0.5, 0.5])


def test_an_exception_leaves_its_checkpoint(tmp_path):
    def fails(trainer, *args):
        if trainer.global_step == 3:
            raise ValueError("no more")

    keep = OnExceptionCheckpoint(tmp_path / "kept")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[LambdaCallback(on_train_batch_end=fails), keep])
    with pytest.raises(UserCodeError, match="no more"):
        fit.fit(Regression(), loaders()[0])
    assert checkpoint.load(keep.ckpt_path)[1]["global_step"] == 3


def test_a_summary_counts_parameters(tmp_path, capfd):
    module = Regression(width=100)
    module.net[0].requires_grad_(False)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RichModelSummary(max_depth=2)])
    fit.fit(module, loaders()[0])
    shown = capfd.readouterr().err
    assert "net.3" in shown
    assert "601" in shown and "101" in shown


def test_a_summary_of_an_example_shows_shapes_and_operations_and_leaves_no_trace():
    class Model(Regression):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
            self.unused = torch.nn.Linear(3, 3)
            self.example_input_array = {"x": torch.zeros(5, 4), "shift": (torch.ones(1), torch.ones(2))}

        def forward(self, x, shift):
            return {"y": self.net(x) + torch.rand(1), "shift": shift}

    module = Model()
    generator = torch.get_rng_state()
    columns = {column.header: list(column.cells) for column in summary(module, -1).columns}
    rows = {row[0]: row[1:] for row in zip(*(columns[n] for n in ("layer", "in", "out", "FLOP")), strict=True)}
    assert rows["net.0"] == ("[5, 4]", "[5, 8]", str(2 * 5 * 4 * 8))
    assert rows["net"] == ("[5, 4]", "[5, 1]", str(2 * 5 * 4 * 8 + 2 * 5 * 8))
    assert rows["unused"] == ("-", "-", "-")
    assert rows["all"][1:] == ("(y=[5, 1], shift=([1], [2]))", "400")
    assert torch.equal(generator, torch.get_rng_state())
    assert module.training and module.net[1].training and module.net[1].num_batches_tracked == 0
    assert not any(layer._forward_hooks for layer in module.modules())


def test_last_is_a_link_to_the_newest_kept_and_goes_on_from_there(tmp_path):
    keep = ModelCheckpoint(save_last="link", save_top_k=2, every_n_train_steps=3)
    trainer(tmp_path, max_epochs=1, callbacks=[keep]).fit(Regression(), loaders()[0])
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.is_symlink() and keep.last_model_path == str(last)
    assert checkpoint.load(last)[1]["global_step"] == 6
    assert last.resolve() == Path(keep.best_model_path).resolve()
    again = trainer(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(every_n_train_steps=100)])
    again.fit(Regression(), loaders()[0], ckpt_path=last)
    assert again.global_step == 8


def test_a_link_takes_the_place_of_a_folder_and_a_folder_that_of_a_link(tmp_path):
    for save_last, is_link in ((True, False), ("link", True), (True, False)):
        keep = ModelCheckpoint(save_last=save_last, every_n_train_steps=8, enable_version_counter=False)
        trainer(tmp_path, max_epochs=1, callbacks=[keep]).fit(Regression(), loaders()[0])
        last = tmp_path / "checkpoints" / "last.ckpt"
        assert last.is_symlink() == is_link
        assert checkpoint.load(last)[1]["global_step"] == 8


def test_what_is_kept_can_be_told_and_written(tmp_path):
    scores = iter([0.5, 0.2, 0.9, 0.3])

    class Scored(Regression):
        def validation_step(self, batch, batch_idx):
            pass

        def on_validation_epoch_end(self):
            self.log("score", next(scores))

    keep = ModelCheckpoint(tmp_path / "kept", monitor="score", mode="max", save_top_k=2, filename="{score:.1f}")
    trainer(tmp_path, max_epochs=4, callbacks=[keep]).fit(Scored(), *loaders())
    assert {Path(path).name: round(float(score), 1) for path, score in keep.best_k_models.items()} == {
        "score=0.9.ckpt": 0.9,
        "score=0.5.ckpt": 0.5,
    }
    assert Path(keep.best_model_path).name == "score=0.9.ckpt"
    assert Path(keep.kth_best_model_path).name == "score=0.5.ckpt"
    assert float(keep.kth_value) == pytest.approx(0.5)
    keep.to_yaml()
    written = yaml.safe_load((tmp_path / "kept" / "best_k_models.yaml").read_text())
    assert written == pytest.approx({path: float(score) for path, score in keep.best_k_models.items()})
    with pytest.raises(ConfigError, match="nothing is kept"):
        ModelCheckpoint().to_yaml()


def test_a_timer_ends_training_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr("trainkit.callbacks.timer.time", SimpleNamespace(monotonic=lambda: clock.now))
    ticks = LambdaCallback(on_train_batch_end=lambda *args: setattr(clock, "now", clock.now + 0.25))
    timer = Timer({"seconds": 3})
    fit = trainer(tmp_path, callbacks=[ticks, timer], max_epochs=-1)
    fit.fit(Regression(), loaders()[0])
    assert fit.global_step == 12
    assert timer.time_remaining() == 0
    again = Timer({"seconds": 4})
    again.load_state_dict(timer.state_dict())
    assert again.time_elapsed() == 3.0
    fit = trainer(tmp_path, callbacks=[ticks, again], max_epochs=-1)
    fit.fit(Regression(), loaders()[0])
    assert fit.global_step == 4


def test_a_timer_may_look_after_epochs_only(tmp_path):
    fit = trainer(tmp_path, max_epochs=9, callbacks=[Timer({"microseconds": 1}, interval="epoch")])
    fit.fit(Regression(), *loaders())
    assert fit.global_step == 8  # a whole epoch, though the time was over at the first step
    assert (fit.state.fn, fit.state.status, fit.interrupted) == ("fit", "finished", False)


def test_a_wish_to_stop_is_not_heard_before_the_least(tmp_path):
    wishes = LambdaCallback(on_train_batch_end=lambda trainer, *args: setattr(trainer, "should_stop", True))
    fit = trainer(tmp_path, callbacks=[wishes], max_epochs=9, min_epochs=2, min_steps=19)
    fit.fit(Regression(), loaders()[0])
    assert fit.global_step == 19


@pytest.mark.parametrize(
    ("settings_", "scores", "epochs"),
    [
        ({"patience": 1}, [3, 2, 2.5, 1], 3),
        ({"patience": 9, "stopping_threshold": 1.5}, [3, 1, 0], 2),
        ({"patience": 9, "divergence_threshold": 5.0}, [3, 6, 0], 2),
        ({"patience": 9}, [3, float("nan"), 0], 2),
        ({"patience": 1, "min_delta": 1.0}, [3, 2.5, 1], 2),
        ({"patience": 1, "mode": "max"}, [1, 2, 3, 2.9, 5], 4),
    ],
)
def test_early_stopping_stops_when_it_says(tmp_path, settings_, scores, epochs):
    class Scored(Regression):
        def on_validation_epoch_end(self):
            self.log("score", float(scores[self.current_epoch]))

    stop = EarlyStopping("score", **settings_)
    fit = trainer(tmp_path, max_epochs=len(scores), callbacks=[stop], enable_checkpointing=False)
    fit.fit(Scored(), *loaders())
    assert fit.current_epoch == epochs
    assert stop.stopping_reason


def test_rates_of_groups_and_names(tmp_path):
    class Groups(Regression):
        def configure_optimizers(self):
            first, second = self.net[0].parameters(), self.net[3].parameters()
            groups = [{"params": first}, {"params": second, "lr": 0.5, "name": "head"}]
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    fit = trainer(tmp_path, max_steps=1, callbacks=[LearningRateMonitor(log_momentum=True)])
    fit.fit(Groups(), loaders()[0])
    found = {name: round(value.item(), 4) for name, value in fit.callback_metrics.items() if name.startswith("lr")}
    assert found == {
        "lr-SGD/pg1": 0.1,
        "lr-SGD/pg1-momentum": 0.9,
        "lr-SGD/head": 0.5,
        "lr-SGD/head-momentum": 0.9,
    }


def test_a_checkpoint_of_weights_only_is_no_place_to_go_on_from(tmp_path):
    keep = ModelCheckpoint(save_weights_only=True)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[keep])
    module = Regression(width=5)
    fit.fit(module, loaders()[0])
    again = Regression.load_from_checkpoint(keep.best_model_path)
    assert torch.equal(flat(module), flat(again))
    with pytest.raises(Exception, match="weights only"):
        trainer(tmp_path, max_epochs=2).fit(module, loaders()[0], ckpt_path=keep.best_model_path)


def test_names_do_not_overwrite_each_other(tmp_path):
    for _ in range(2):
        trainer(tmp_path, max_epochs=1).fit(Regression(), loaders()[0])
    names = sorted(path.name for path in Path(tmp_path, "checkpoints").iterdir())
    assert names == ["epoch=0-step=8-v1.ckpt", "epoch=0-step=8.ckpt"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMA(1.0),
        lambda: StochasticWeightAveraging(0.0),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=0),
        lambda: OnExceptionCheckpoint(".", ""),
        lambda: RichModelSummary(-2),
        lambda: LearningRateMonitor("batch"),
    ],
)
def test_wrong_arguments_are_refused(make):
    with pytest.raises(ConfigError):
        make()
