"""What is wrong is refused early, by name, with the value and the limit: the rows of the reliability contract."""

from __future__ import annotations

import math
import os
import pickle
import signal

import pytest
import torch
from tests.trainkit.tiny import Regression, dataset, loaders, trainer
from torch.utils.data import DataLoader

import trainkit
from common_platform import errors
from trainkit.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler, LambdaCallback, ModelCheckpoint
from trainkit.strategies import choose

ARGUMENTS = [
    ("accumulate_grad_batches", 0, ">= 1"),
    ("accumulate_grad_batches", 1.5, "number"),
    ("max_steps", -5, "-1"),
    ("max_steps", 0, "1 or more"),
    ("max_steps", True, "number"),
    ("max_epochs", -2, "-1"),
    ("min_epochs", -1, "0 or more"),
    ("strategy", "ddpp", "ddpp.*single.*ddp"),
    ("strategy", "fsdp", "not part of this version"),
    ("precision", "fp7", "fp7.*bf16-mixed"),
    ("devices", "all the gpus", "auto"),
    ("devices", [0, 0], "duplicate 0"),
    ("devices", 0, "1 or more"),
    ("devices", [], "a number"),
    ("gradient_clip_val", -1, "0 or more"),
    ("gradient_clip_val", math.nan, "0 or more"),
    ("gradient_clip_algorithm", "hair", "'norm' or 'value'"),
    ("val_check_interval", 1.5, "0.0..1.0"),
    ("val_check_interval", "soon", "DD:HH:MM:SS"),
    ("val_check_interval", {"fortnights": 1}, "DD:HH:MM:SS"),
    ("val_check_interval", "00:00:00", "above zero"),
    ("check_val_every_n_epoch", 0, "1 or more"),
    ("limit_train_batches", -1, "from 0 on"),
    ("limit_val_batches", math.nan, "from 0 on"),
    ("overfit_batches", "all", "from 0 on"),
    ("fast_dev_run", -1, ">= 1"),
    ("num_sanity_val_steps", -2, ">= -1"),
    ("log_every_n_steps", -1, ">= 0"),
    ("max_time", "soon", "DD:HH:MM:SS"),
    ("max_skipped", 0, ">= 1"),
    ("accelerator", "abacus", "auto"),
    ("callbacks", [object()], "Callback"),
    ("logger", [3], "Logger"),
    ("plugins", "fast", "Precision"),
    ("num_nodes", 2, "torchrun"),
    ("profiler", "slow", "simple.*advanced.*pytorch"),
    ("reload_dataloaders_every_n_epochs", -1, ">= 0"),
    ("model_registry", "x", "in this version"),
]


@pytest.mark.parametrize(("argument", "value", "says"), ARGUMENTS)
def test_wrong_arguments_of_the_trainer(tmp_path, argument, value, says):
    with pytest.raises(errors.ConfigError, match=f"(?s){argument}.*{says}") as raised:
        trainer(tmp_path, **{argument: value})
    assert raised.value.code == "invalid_config"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EarlyStopping("x", patience=-1), "patience"),
        (lambda: EarlyStopping("x", min_delta=-1.0), "min_delta"),
        (lambda: EarlyStopping("x", mode="up"), "mode"),
        (lambda: ModelCheckpoint(every_n_train_steps=0), "every_n_train_steps"),
        (lambda: ModelCheckpoint(save_top_k=-2), "save_top_k"),
        (lambda: ModelCheckpoint(every_n_train_steps=2, every_n_epochs=1), "one of"),
        (lambda: LambdaCallback(on_lunch=print), "on_lunch"),
        (lambda: GradientAccumulationScheduler({}), "scheduling"),
        (lambda: trainkit.seed_everything("abc"), "seed"),
        (lambda: trainkit.seed_everything(-1), "seed"),
    ],
)
def test_wrong_arguments_of_others(make, says):
    with pytest.raises(errors.ConfigError, match=says):
        make()


def test_two_keepers_in_one_folder_are_refused(tmp_path):
    folder = tmp_path / "kept"
    with pytest.raises(errors.ConfigError, match="kept"):
        keepers = [ModelCheckpoint(folder, save_last=True, every_n_epochs=n) for n in (1, 2)]
        trainer(tmp_path, callbacks=keepers)


def test_a_missing_gpu_is_never_replaced(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(errors.DeviceError, match="gpu|cuda"):
        trainer(tmp_path, accelerator="gpu")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(errors.ResourceError, match="pip install deepspeed"):
        trainer(tmp_path, strategy="deepspeed")


def configured(make):
    class Model(Regression):
        def configure_optimizers(self):
            return make(self)

    return Model()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: torch.optim.SGD([], lr=0.1), "optimizer.*0 parameters"),
        (lambda m: torch.optim.SGD(m.freeze().parameters(), lr=0.1), "no trainable parameters"),
        (lambda m: None, "configure_optimizers.*NoneType"),
        (lambda m: "adam", "configure_optimizers.*str"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=math.inf), "lr.*inf"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(math.nan)), "lr.*nan"),
        (lambda m: [torch.optim.SGD(m.parameters(), lr=1.0) for _ in "ab"], "automatic_optimization = False"),
        (lambda m: {"optimizer": torch.optim.SGD(m.parameters(), lr=1.0), "lr_scheduler": {"when": 1}}, "'scheduler'"),
    ],
)
def test_wrong_optimizers(tmp_path, make, says):
    with pytest.raises(errors.ConfigError, match=says):
        trainer(tmp_path, max_epochs=1).fit(configured(make), loaders()[0])


def stepping(step):
    class Model(Regression):
        training_step = step

    return Model()


@pytest.mark.parametrize(
    ("step", "kind", "says"),
    [
        (lambda s, b, i: s.loss(b) * (math.nan if i == 7 else 1), errors.NonFiniteLoss, "step 7, batch 7, rank 0"),
        (lambda s, b, i: s.loss(b).detach(), errors.TrainingError, "no grad"),
        (lambda s, b, i: s.net(b[0])[:, 0], errors.TrainingError, r"shape \[8\]"),
        (lambda s, b, i: None, errors.TrainingError, "None for 5 batches in a row.*max_skipped"),
        (lambda s, b, i: {"los": s.loss(b)}, errors.TrainingError, "scalar loss"),
        (lambda s, b, i: 1 / 0, errors.UserCodeError, "training_step raised ZeroDivisionError at step 0, batch 0"),
    ],
)
def test_wrong_steps(tmp_path, step, kind, says):
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1)
    with pytest.raises(kind, match=says):
        trainer(tmp_path, max_epochs=2, max_skipped=5, callbacks=[keep]).fit(stepping(step), loaders()[0])
    last = trainkit.trainer.checkpoint.find_last(tmp_path / "kept")
    if last is not None:
        for tensor in trainkit.trainer.checkpoint.load(last)[0].values():
            assert torch.isfinite(tensor).all()


class Bad:
    """A dataset with a bad row."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 36:
            raise ValueError("bad row")
        if index == 39:
            os.kill(os.getpid(), signal.SIGKILL)
        return dataset(40)[index]


def test_a_loader_that_raises_names_the_batch(tmp_path):
    with pytest.raises(errors.UserCodeError, match="batch 12, rank 0.*bad row") as raised:
        trainer(tmp_path, max_epochs=1).fit(Regression(), DataLoader(Bad(), 3))
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_worker_that_is_killed_is_named(tmp_path):
    with pytest.raises(errors.UserCodeError, match=r"worker \(pid.*\d"):
        loader = DataLoader(Bad(), 1, num_workers=1, sampler=[1, 39, 2, 3])
        trainer(tmp_path, max_epochs=1).fit(Regression(), loader)


def test_an_empty_loader_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="train.*0 batches"):
        trainer(tmp_path, max_epochs=1).fit(Regression(), DataLoader(dataset(3), 8, drop_last=True))


def test_an_interval_beyond_the_epoch_names_both(tmp_path):
    with pytest.raises(errors.ConfigError, match="1000000000.*8"):
        trainer(tmp_path, max_epochs=1, val_check_interval=10**9).fit(Regression(), *loaders())


class Breaks(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise ValueError("first")

    def teardown(self, trainer, pl_module, stage):
        raise KeyError("second")


class Ends(Callback):
    ended = 0

    def teardown(self, trainer, pl_module, stage):
        self.ended += 1


def test_the_first_error_counts_and_every_teardown_runs(tmp_path):
    ends = Ends()
    with pytest.raises(errors.UserCodeError, match="Breaks.on_train_batch_end raised ValueError at step 1") as raised:
        trainer(tmp_path, max_epochs=1, callbacks=[Breaks(), ends]).fit(Regression(), loaders()[0])
    assert isinstance(raised.value.__cause__, ValueError)
    assert "second" in raised.value.__notes__[0]
    assert ends.ended == 1


class Boom:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should-not-be-there",))


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path):
    with (tmp_path / "evil.ckpt").open("wb") as file:
        pickle.dump({"state_dict": Boom()}, file)
    torch.save({"state_dict": {}, "hyper_parameters": Boom()}, tmp_path / "worse.ckpt")
    for name in ("evil.ckpt", "worse.ckpt"):
        with pytest.raises((errors.ArtifactRefused, errors.CheckpointCorrupt), match=name):
            Regression.load_from_checkpoint(tmp_path / name)
    assert not os.path.exists("/tmp/should-not-be-there")  # noqa: PTH110


def test_a_lightning_checkpoint_gives_its_weights(tmp_path):
    module = Regression(width=5)
    state = {"state_dict": module.state_dict(), "hyper_parameters": {"width": 5, "lr": 0.1, "dropout": 0.0}, "epoch": 3}
    torch.save(state, tmp_path / "theirs.ckpt")
    again = Regression.load_from_checkpoint(tmp_path / "theirs.ckpt", lr=0.5)
    assert (again.hparams.width, again.hparams.lr) == (5, 0.5)
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    fit = trainer(tmp_path_factory.mktemp("saved"), max_epochs=1)
    fit.fit(Regression(), *loaders())
    fit.save_checkpoint(fit.default_root_dir / "kept")
    return fit.default_root_dir / "kept"


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (lambda: Regression(width=9), r"shape \[8.*\[9"),
        (lambda: configured(lambda m: torch.optim.SGD(m.parameters(), lr=1.0)), "AdamW.*SGD"),
        (lambda: configured(lambda m: torch.optim.AdamW(m.parameters(), lr=1.0)), "ExponentialLR.*none"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path, module, says):
    with pytest.raises(errors.CheckpointError, match=says):
        trainer(tmp_path, max_epochs=2).fit(module(), *loaders(), ckpt_path=saved)


def test_missing_and_additional_names_are_listed(saved, tmp_path):
    class More(Regression):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(1, 1)

    with pytest.raises(errors.CheckpointError, match=r"2 tensors.*missing: extra.bias, extra.weight"):
        trainer(tmp_path, max_epochs=2).fit(More(), *loaders(), ckpt_path=saved)


def test_state_that_cannot_be_written_names_its_key(tmp_path):
    class Holds(Callback):
        def state_dict(self):
            return {"lock": object()}

    with pytest.raises(errors.CheckpointError, match="callbacks.*Holds.lock: got object"):
        trainer(tmp_path, max_epochs=1, callbacks=[Holds()]).fit(Regression(), loaders()[0])


def test_endless_overflow_ends(tmp_path):
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch).float() * 1e30

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(errors.NonFiniteLoss, match="loss scale.*max_skipped"):
        fit = trainer(tmp_path, max_epochs=-1, precision="16-mixed", max_skipped=20)
        fit.fit(Overflows(), loaders()[0])
