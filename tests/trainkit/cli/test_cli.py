"""The command line: it runs, its configuration makes the run again, and what is wrong is named with its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tests.trainkit.cli.parts import Data, Net
from tests.trainkit.tiny import child_environment, trainer

import trainkit
from trainkit.callbacks import Callback
from trainkit.cli import LightningCLI, SaveConfigCallback
from trainkit.cli.main import main

PARTS = "tests.trainkit.cli.parts"
BASE = ["--model", f"{PARTS}.Net", "--data", f"{PARTS}.Data"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The folder in which one stands; what is imported from is the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0)


def fit(*arguments: str) -> int:
    return run("fit", *BASE, *QUIET, *arguments)


def rows(folder: str) -> str:
    return Path(folder, "metrics.csv").read_text()


def test_fit_does_what_a_script_does_and_its_config_does_it_again(tmp_path):
    assert fit("--trainer.max_epochs", "2", "--model.width", "3", "--seed_everything", "7") == 0
    trainkit.seed_everything(7)
    trainer(tmp_path / "script", max_epochs=2, num_sanity_val_steps=2).fit(Net(width=3), datamodule=Data())
    first = rows("runs/logs/version_0")
    assert first == rows("script/logs/version_0")
    saved = yaml.safe_load(Path("runs/logs/version_0/config.yaml").read_text())
    assert saved["model"] == {"class_path": f"{PARTS}.Net", "init_args": {"width": 3, "lr": 0.01}}
    assert saved["seed_everything"] == 7
    assert run("fit", "--config", "runs/logs/version_0/config.yaml") == 0
    assert rows("runs/logs/version_1") == first


def test_later_settings_win_and_printed_ones_can_be_read_back(capsys):
    Path("a.yaml").write_text(f"model: {PARTS}.Net\ntrainer: {{max_epochs: 3}}\n")
    Path("b.yaml").write_text("trainer: {max_epochs: 2}\n")
    assert run("fit", "--config", "a.yaml", "--config", "b.yaml", "--model.width", "5", "--print_config") == 0
    printed = capsys.readouterr().out
    read = yaml.safe_load(printed)
    assert (read["trainer"]["max_epochs"], read["model"]["init_args"]["width"]) == (2, 5)
    Path("c.yaml").write_text(printed)
    assert run("fit", "--config", "c.yaml", "--print_config") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_other_commands_use_the_checkpoint(capsys):
    assert fit("--trainer.max_epochs", "1") == 0
    kept = str(next(p for p in Path("runs/checkpoints").iterdir() if p.is_dir()))
    for command, name in (("validate", "val_loss"), ("test", "test_loss")):
        assert run(command, *BASE, *QUIET, "--ckpt_path", kept) == 0
        assert name in capsys.readouterr().out
    assert run("predict", *BASE, *QUIET, "--ckpt_path", kept) == 0
    assert run("export", "--checkpoint", "runs/checkpoints", "--format", "torchscript", "--out", "net.pt") == 0
    loaded = Net.load_from_checkpoint(kept).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.jit.load("net.pt")(x), loaded(x))
    assert run("export", "--checkpoint", kept, "--format", "torchscript", "--out", "net.pt", "--overwrite") == 0


def test_resume_goes_on_from_a_checkpoint_with_the_settings_of_its_run():
    assert fit("--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole", "--seed_everything", "1") == 0
    settings = ["--trainer.max_epochs", "1", "--trainer.default_root_dir", "cut", "--seed_everything", "1"]
    assert fit(*settings) == 0
    config = Path("cut/checkpoints/config.yaml")
    config.write_text(config.read_text().replace("max_epochs: 1", "max_epochs: 2"))
    assert run("resume", "--checkpoint", "cut/checkpoints") == 0
    last = [rows(name).splitlines()[-1] for name in ("whole/logs/version_0", "cut/logs/version_1")]
    assert last[0] == last[1]


def test_optimizers_and_schedules_can_be_chosen():
    arguments = ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.5", "--optimizer.momentum", "0.9",
                 "--lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler.gamma", "0.5"]  # fmt: skip
    made = {}

    class CLI(LightningCLI):
        def after_fit(self):
            made["optimizer"], made["model"] = self.trainer.optimizers[0], self.model

    CLI(args=["fit", *BASE, *QUIET, "--trainer.fast_dev_run", "1", *arguments])
    assert isinstance(made["optimizer"], torch.optim.SGD)
    assert made["optimizer"].param_groups[0]["momentum"] == 0.9
    assert made["optimizer"].param_groups[0]["lr"] == 0.25


class Told(Callback):
    def __init__(self, word: str = "none") -> None:
        self.word = word


def test_a_script_of_ones_own_has_links_defaults_and_callbacks():
    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(Told, "told")
            parser.link_arguments("data.count", "model.width")
            parser.set_defaults({"told.word": "hello"})

    cli = CLI(Net, Data, args=["--data.count", "16"], run=False, seed_everything_default=3,
              trainer_defaults={"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"})  # fmt: skip
    assert cli.model.hparams["width"] == 16
    assert isinstance(cli.datamodule, Data)
    assert [one.word for one in cli.trainer.callbacks if isinstance(one, Told)] == ["hello"]
    assert any(isinstance(one, SaveConfigCallback) for one in cli.trainer.callbacks)
    assert cli.trainer.max_epochs == 1
    cli.trainer.fit(cli.model, cli.datamodule)


def test_loggers_and_callbacks_by_class_path():
    logger = ["--trainer.logger", "trainkit.loggers.CSVLogger", "--trainer.logger.save_dir", "here"]
    callbacks = ["--trainer.callbacks+", "trainkit.callbacks.LearningRateMonitor", "--trainer.callbacks+",
                 "trainkit.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]  # fmt: skip
    assert fit("--trainer.max_epochs", "1", *logger, *callbacks) == 0
    assert "lr-AdamW" in rows("here/logs/version_0")


def test_info_tells_the_devices_facts_and_the_extras(capsys):
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["platform"]["device_type"]
    assert found["extras"]["cli"]
    assert run("info") == 0
    assert "platform" in capsys.readouterr().out


WRONG = [  # arguments after the parts, exit status, what stderr says
    pytest.param(["--trainer.max_epchs", "1"], 2, "trainer.max_epchs: unknown; did you mean trainer.max_ep", id="f"),
    pytest.param(["--trainer.max_epochs", "abc"], 2, "trainer.max_epochs: got abc; allowed int", id="type"),
    pytest.param(["--trainer.callbacks+", "trainkit.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "x",
                  "--trainer.callbacks.patience", "-1"], 3, "EarlyStopping.patience: got -1", id="trn-019"),
    pytest.param(["--model.lr", ".nan"], 3, "lr: got nan", id="trn-001"),
    pytest.param(["--model.lr=-1e-3"], 3, "lr: got -0.001", id="trn-002"),
    pytest.param(["--model.lr", ".inf"], 3, "lr: got inf", id="trn-003"),
    pytest.param(["--trainer.accumulate_grad_batches", "0"], 3, "accumulate_grad_batches: got 0", id="trn-004"),
    pytest.param(["--trainer.accumulate_grad_batches", "1.5"], 2, "accumulate_grad_batches: got 1.5", id="trn-005"),
    pytest.param(["--data.batch_size", "0"], 3, "batch_size", id="trn-006"),
    pytest.param(["--data.batch_size", "-4"], 3, "batch_size", id="trn-007"),
    pytest.param(["--trainer.max_steps", "-5"], 3, "max_steps: got -5", id="trn-008"),
    pytest.param(["--trainer.strategy", "ddpp"], 3, "strategy: got ddpp", id="trn-011"),
    pytest.param(["--trainer.precision", "fp7"], 3, "precision: got fp7", id="trn-013"),
    pytest.param(["--trainer.devices", "all the gpus"], 3, "devices: got all the gpus", id="trn-014"),
    pytest.param(["--trainer.devices", "[0,0]"], 3, "duplicate 0", id="trn-015"),
    pytest.param(["--trainer.gradient_clip_val", "-1"], 3, "gradient_clip_val: got -1", id="trn-017"),
    pytest.param(["--trainer.val_check_interval", "1000000000"], 3, "val_check_interval", id="trn-022"),
    pytest.param(["--seed_everything", "abc"], 2, "seed_everything: got abc", id="trn-023"),
    pytest.param(["--data.count", "0"], 3, "train", id="trn-034"),
    pytest.param(["--model", f"{PARTS}.Warms", "--model.warmup_steps=-1"], 3, "warmup_steps: got -1", id="trn-009"),
    pytest.param(["--model", f"{PARTS}.Warms", "--model.warmup_steps=11"], 3, "got 11; allowed 0..total_steps=10",
                 id="trn-010"),
    pytest.param(["--trainer.callbacks+", "trainkit.callbacks.EarlyStopping", "--trainer.callbacks.monitor",
                  "val_los"], 3, "monitor: got val_los; allowed a logged metric: ['train_loss'", id="trn-018"),
    pytest.param(["--trainer.callbacks+", "trainkit.callbacks.ModelCheckpoint",
                  "--trainer.callbacks.every_n_train_steps", "0"], 3, "every_n_train_steps: got 0", id="trn-020"),
    pytest.param(["--trainer.callbacks", str([{"class_path": "trainkit.callbacks.ModelCheckpoint", "init_args": {
                  "dirpath": "kept", "save_last": True, "every_n_epochs": n}} for n in (1, 2)])], 3, "kept, twice",
                 id="trn-021"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "status", "says"), WRONG)
def test_what_is_wrong_is_named(capsys, arguments, status, says):
    assert fit("--trainer.max_epochs", "1", *arguments) == status
    said = capsys.readouterr()
    assert not said.out
    assert says in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("model: !!python/object/apply:os.system ['touch x']\n", "os.system", id="cli-021"),
        pytest.param("trainer:\n  max_epochs: 1\n  max_epochs: 2\n", "max_epochs: got twice", id="cfg-001"),
        pytest.param(
            "trainer: {max_epoch: 1}\n", "trainer.max_epoch: unknown; did you mean trainer.max_e", id="cfg-002"
        ),
        pytest.param("a: &a [x]\nb: [" + "*a, " * 100 + "*a]\n", "aliases", id="cfg-011"),
        pytest.param("- a list\n", "a mapping", id="no-mapping"),
        pytest.param("a: [\n", "valid YAML", id="no-yaml"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_and_nothing_is_executed(capsys, text, says):
    Path("wrong.yaml").write_text(text)
    assert fit("--config", "wrong.yaml") == 3
    assert says in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("trainer: {accumulate_grad_batches: 1.5}", "accumulate_grad_batches: got 1.5", id="trn-005"),
        pytest.param("trainer: {accumulate_grad_batches: '2'}", "accumulate_grad_batches: got the text", id="cfg-003"),
        pytest.param('model: {class_path: tests.trainkit.cli.parts.Net, init_args: {lr: "0.1"}}',
                     "model.init_args.lr: got the text", id="cfg-003-nested"),
        pytest.param("seed_everything: abc", "seed_everything: got abc", id="trn-023"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_in_a_file_is_a_refused_configuration(capsys, text, says):
    """On the command line itself it is wrong usage, with status 2."""
    Path("wrong.yaml").write_text(text)
    assert fit("--config", "wrong.yaml") == 3
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        pytest.param(["--trainer.strategy", "deepspeed"], "pip install deepspeed", id="trn-012"),
        pytest.param(["--trainer.accelerator", "cuda", "--trainer.devices", "[9]"], "devices: got 9; allowed 0..0",
                     id="trn-016"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_has_its_own_status(monkeypatch, capsys, strategy, says):
    """On a machine with one GPU and without deepspeed, wherever the test runs."""
    monkeypatch.setattr("trainkit.strategies.choose.find_spec", lambda name: None)
    monkeypatch.setattr("trainkit.strategies.choose.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("trainkit.strategies.choose.detect", lambda _: SimpleNamespace(devices=["one GPU"]))
    assert run("fit", *BASE, *strategy) == 5
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        pytest.param(["fit", "--config", "does-not-exist.yaml"], 3, "does-not-exist.yaml", id="cli-020"),
        pytest.param(["resume", "--checkpoint", "empty"], 4, "empty", id="cli-022"),
        pytest.param(["export", "--checkpoint", "c", "--out", "full"], 3, "--overwrite", id="cli-023"),
        pytest.param(["fit", *BASE, *QUIET, "--ckpt_path", "empty"], 4, "manifest.json", id="no-checkpoint"),
        pytest.param(["fit", *BASE, "--trainer.accelerator", "cuda"], 5, "cuda", id="trn-024"),
        pytest.param([], 2, "fit", id="nothing"),
        pytest.param(["dance"], 2, "dance", id="unknown-command"),
    ],
)
def test_exit_statuses(capsys, arguments, status, says):
    if status == 5 and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/file").touch()
    assert run(*arguments) == status
    assert says in capsys.readouterr().err


def test_a_run_that_fails_has_its_own_status_and_a_traceback():
    command = [
        sys.executable,
        "-m",
        "trainkit",
        "fit",
        "--model",
        f"{PARTS}.Diverges",
        "--data",
        f"{PARTS}.Data",
        *QUIET,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=child_environment(), check=False)
    assert done.returncode == 7
    assert "error: loss: got nan" in done.stderr
    assert "Traceback" in done.stderr


def test_a_missing_library_is_named_and_info_needs_none(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "trainkit.cli.parser", raising=False)
    assert run("fit", *BASE) == 5
    assert "pip install 'trainkit[cli]'" in capsys.readouterr().err
    assert run("info") == 0
