"""MLflow and W&B, without a network: what was logged is in their own stores."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from tests.trainkit.test_loggers import Remembers
from tests.trainkit.tiny import Regression, loaders, trainer

from common_platform.errors import ResourceError
from trainkit.loggers import ConsoleLogger, MLFlowLogger, WandbLogger, mlflow, wandb
from trainkit.loggers.flat import flattened


@pytest.mark.skipif(find_spec("mlflow") is None, reason="no mlflow: nox -s loggers")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_value_and_the_settings(tmp_path):
    from mlflow.tracking import MlflowClient

    mine, theirs = Remembers(), MLFlowLogger("exp", run_name="one", save_dir=tmp_path / "mlruns", tags={"a": "b"})
    trainer(tmp_path, max_epochs=2, logger=[mine, theirs]).fit(Regression(width=5), *loaders())
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    run = client.get_run(theirs.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["a"]) == ("FINISHED", "one", "b")
    assert run.data.params["width"] == "5"
    for name in ("train_loss", "val_loss"):
        found = {m.step: m.value for m in client.get_metric_history(theirs.run_id, name)}
        assert found == {step: row[name] for step, row in mine.rows if name in row}


@pytest.mark.skipif(find_spec("wandb") is None, reason="no wandb: nox -s loggers")
@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("one", save_dir=tmp_path, offline=True, project="p")
    trainer(tmp_path, max_epochs=2, logger=logger).fit(Regression(width=5), *loaders())
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    text = files[0].read_bytes()
    assert all(name in text for name in (b"train_loss", b"val_loss", b"width"))


class Run:
    """A run as W&B makes it, which remembers."""

    def __init__(self):
        self.rows, self.config, self.ended, self.id = [], {}, None, "x"

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.ended = exit_code


def test_a_run_that_was_made_already_gets_the_rows():
    run = Run()
    logger = WandbLogger(experiment=run, prefix="a")
    logger.log_metrics({"x": 1.0}, 3)
    logger.finalize("failed")
    assert run.rows == [{"a-x": 1.0, "trainer/global_step": 3}]
    assert run.ended == 1


@pytest.mark.parametrize(("module", "kind", "extra"), [(mlflow, MLFlowLogger, "mlflow"), (wandb, WandbLogger, "wandb")])
def test_a_missing_library_is_named(monkeypatch, module, kind, extra):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=rf"{extra}.*pip install 'trainkit\[{extra}\]'"):
        kind()


def test_the_console_shows_a_table_that_grows(capsys):
    logger = ConsoleLogger()
    logger.log_metrics({"loss": 0.5}, 1)
    logger.log_metrics({"loss": 0.25, "val": 3.0}, 2)
    logger.log_metrics({"val": 2.0}, 3)
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines == [["step", "loss"], ["1", "0.5"], ["step", "loss", "val"], ["2", "0.25", "3"], ["3", "2"]]
    ConsoleLogger(columns=["val"]).log_metrics({"loss": 1.0}, 0)
    assert not capsys.readouterr().err


def test_settings_within_settings_have_paths():
    assert flattened({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b/c": 2, "b/d/e": 3}
