"""A run's curves: what was logged, in groups, as a picture or a page."""

from __future__ import annotations

import re
import sys

import pytest
from tests.trainkit.tiny import Regression, loaders, trainer

from common_platform.errors import ConfigError, ResourceError
from trainkit.callbacks import LearningRateMonitor
from trainkit.cli.main import main
from trainkit.plot_run import _grouped, plot_run, read_curves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit = trainer(folder, max_epochs=2, callbacks=[LearningRateMonitor()])
    fit.fit(Regression(), *loaders())
    return folder


def test_curves_are_what_was_logged(run):
    curves = read_curves(run / "logs" / "version_0" / "metrics.csv")
    assert [step for step, _ in curves["train_loss"]] == list(range(16))
    assert [step for step, _ in curves["val_loss"]] == [7, 15]
    assert list(_grouped(curves)) == ["loss", "learning rate"]
    assert set(_grouped(curves)["loss"]) == {"train_loss", "val_loss"}


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.html", b"<!doctype")])
def test_it_is_drawn_in_each_format(run, tmp_path, capsys, name, begins):
    assert main(["plot", str(run), "--out", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / name)
    written = (tmp_path / name).read_bytes()
    assert written.startswith(begins)
    if name.endswith("html"):
        assert re.search(rb"<td>val_loss</td><td>15</td>", written)


def test_the_picture_stands_beside_the_log(run):
    assert plot_run(run) == run / "logs" / "version_0" / "curves.png"


def test_what_cannot_be_drawn_is_named(run, tmp_path, monkeypatch, capsys):
    assert main(["plot", str(tmp_path / "nowhere")]) == 3
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--out.*\.pdf"):
        plot_run(run, "a.pdf")
    (tmp_path / "metrics.csv").write_text("step,epoch\n")
    with pytest.raises(ConfigError, match="logged something"):
        plot_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match=r"matplotlib.*trainkit\[plot\]"):
        plot_run(run)
