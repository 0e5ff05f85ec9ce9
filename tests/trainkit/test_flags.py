"""Arguments of the Trainer and names of modules that other tests do not turn on: each does what it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.trainkit.tiny import Regression, dataset, loaders, trainer
from torch.utils.data import DataLoader

from trainkit.callbacks import EarlyStopping, LambdaCallback, RichProgressBar
from trainkit.loggers import Logger


class Watches(Regression):
    """Remembers what it finds in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list = []

    def look(self):
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def training_step(self, batch, batch_idx):
        self.found.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.found.append(self.look())

    def test_step(self, batch, batch_idx):
        self.found.append(batch_idx)

    def predict_step(self, batch, batch_idx):
        self.found.append(batch_idx)


@pytest.fixture(autouse=True)
def switches():
    """What the flags set for the whole process is as it was, afterwards."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def few(root, **settings):
    return trainer(root, max_steps=1, logger=False, enable_checkpointing=False, **settings)


def test_test_and_prediction_are_limited(tmp_path):
    run, module = few(tmp_path, limit_test_batches=2, limit_predict_batches=0.5), Watches()
    run.test(module, DataLoader(dataset(20), 4), verbose=False)
    run.predict(module, DataLoader(dataset(24), 4))
    assert module.found == [0, 1, 0, 1, 2]
    assert (run.limit_test_batches, run.limit_predict_batches) == (2, 0.5)


@pytest.mark.parametrize(
    ("deterministic", "wanted"), [(True, (True, False)), ("warn", (True, True)), (None, (False, False))]
)
def test_algorithms_are_deterministic_where_that_is_asked_for(tmp_path, deterministic, wanted):
    module = Watches()
    few(tmp_path, deterministic=deterministic).fit(module, loaders()[0])
    assert module.found == [wanted]


@pytest.mark.parametrize("benchmark", [True, False])
def test_cudnn_is_told_to_look_for_the_fastest(tmp_path, benchmark):
    torch.backends.cudnn.benchmark = not benchmark
    few(tmp_path, benchmark=benchmark).fit(Regression(), loaders()[0])
    assert torch.backends.cudnn.benchmark == benchmark


@pytest.mark.parametrize(("inference", "wanted"), [(True, (True, False)), (False, (False, False))])
def test_an_evaluation_is_in_inference_mode_or_without_gradients(tmp_path, inference, wanted):
    module = Watches()
    few(tmp_path, inference_mode=inference).validate(module, loaders()[1], verbose=False)
    assert set(module.found) == {wanted}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:.*Error detected in")
def test_the_operation_that_makes_a_gradient_nan_is_found(tmp_path):
    class Root(Regression):
        def training_step(self, batch, batch_idx):
            return (self.net[0].weight.sum() * 0).sqrt() * 0 + self.loss(batch)

    with pytest.raises(RuntimeError, match="SqrtBackward.*nan"):
        few(tmp_path, detect_anomaly=True).fit(Root(), loaders()[0])


class Told(Logger):
    def __init__(self) -> None:
        self.rows, self.hparams = [], []

    def log_metrics(self, metrics, step):
        self.rows.append(metrics)

    def log_hyperparams(self, params):
        self.hparams.append(dict(params))


@pytest.mark.parametrize("enabled", [True, False])
def test_loggers_are_told_of_hyperparameters_unless_that_is_off(tmp_path, enabled):
    logger = Told()
    trainer(tmp_path, max_steps=1, logger=logger, enable_autolog_hparams=enabled).fit(Regression(width=5), loaders()[0])
    assert [found["width"] for found in logger.hparams] == [5] * enabled


def test_barebones_is_the_loop_alone(tmp_path, capfd):
    run = trainer(
        tmp_path, max_epochs=1, barebones=True, num_sanity_val_steps=2, logger=Told(), enable_progress_bar=None
    )
    run.fit(Regression(), *loaders())
    assert (run.loggers, run.callbacks, run.num_sanity_val_steps, run.global_step) == ([], [], 0, 8)
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_training_ends_when_its_time_is_over(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("trainkit.callbacks.timer.time", SimpleNamespace(monotonic=lambda: clock.now))
    ticks = LambdaCallback(on_train_batch_end=lambda *args: setattr(clock, "now", clock.now + 1.0))
    run = trainer(tmp_path, max_time="00:00:00:11", callbacks=[ticks])
    run.fit(Regression(), loaders()[0])
    assert run.global_step == 11
    assert run.max_epochs == -1


@pytest.mark.parametrize(("finite", "epochs"), [(True, 2), (False, 4)])
def test_a_metric_that_is_no_number_stops_unless_it_may_be_one(tmp_path, finite, epochs):
    class Turns(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("score", float("nan") if self.current_epoch == 1 else -float(self.current_epoch))

    stop = EarlyStopping("score", patience=3, check_finite=finite)
    run = trainer(tmp_path, max_epochs=4, callbacks=[stop])
    run.fit(Turns(), *loaders())
    assert run.current_epoch == epochs


def test_rich_is_a_name_for_our_bar(tmp_path, capfd):
    trainer(tmp_path, max_epochs=1, callbacks=[RichProgressBar(refresh_rate=3, leave=True)]).fit(
        Regression(), *loaders()
    )
    assert "epoch 0 step 8 loss=" in capfd.readouterr().err


def test_parameters_are_frozen_and_given_back(tmp_path):
    module = Regression()
    assert not any(p.requires_grad for p in module.freeze().parameters())
    assert not module.training
    assert all(p.requires_grad for p in module.unfreeze().parameters())
    assert module.training


def test_only_the_toggled_optimizers_parameters_need_gradients(tmp_path):
    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.seen = []

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second):
                with self.toggled_optimizer(optimizer):
                    self.seen.append((self.net[0].weight.requires_grad, self.net[3].weight.requires_grad))
            self.seen.append((self.net[0].weight.requires_grad, self.net[3].weight.requires_grad))
            first.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[n].parameters(), lr=0.1) for n in (0, 3)]

    module = Two()
    few(tmp_path).fit(module, loaders()[0])
    assert module.seen[:3] == [(True, False), (False, True), (True, True)]
