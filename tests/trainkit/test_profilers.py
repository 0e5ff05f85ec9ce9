"""Profilers see what the run does, change nothing of it, and write where they were told."""

from __future__ import annotations

import json
import pstats

import pytest
from tests.trainkit.tiny import Regression, loaders, trainer

import trainkit
from common_platform.errors import ConfigError, TrainingError
from trainkit.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler, make_profiler


def fitted(tmp_path, profiler, **settings):
    trainkit.seed_everything(1)
    module = Regression()
    fit = trainer(tmp_path, max_epochs=2, profiler=profiler, **settings)
    fit.fit(module, *loaders())
    return fit, module


def test_simple_counts_every_action(tmp_path):
    profiler = SimpleProfiler(tmp_path, "time")
    fitted(tmp_path, profiler)
    calls = {name: len(taken) for name, taken in profiler.recorded_durations.items()}
    assert calls["run_training_batch"] == calls["training_step"] == calls["backward"] == calls["optimizer_step"] == 16
    assert calls["train_dataloader_next"] == 16
    assert calls["on_train_epoch_end"] == calls["run_validation"] == 2
    assert calls["save_checkpoint"] >= 1
    inner = sum(profiler.recorded_durations["training_step"]) + sum(profiler.recorded_durations["backward"])
    assert inner <= sum(profiler.recorded_durations["run_training_batch"])
    report = (tmp_path / "fit-time-0.txt").read_text()
    assert "optimizer_step | 16 |" in report


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_a_profiled_run_is_the_same_run(tmp_path, name, capsys):
    weights = []
    for profiler in (None, name):
        _, module = fitted(tmp_path / str(profiler), profiler)
        weights.append([p.tolist() for p in module.parameters()])
    assert weights[0] == weights[1]
    assert {"simple": "optimizer_step", "advanced": "cumulative", "pytorch": "aten::"}[name] in capsys.readouterr().err


def test_advanced_names_the_functions(tmp_path):
    profiler = AdvancedProfiler(tmp_path, "functions", dump_stats=True)
    fitted(tmp_path, profiler)
    report = (tmp_path / "fit-functions-0.txt").read_text()
    assert "run_training_batch" in report
    assert "training_step" in report
    files = sorted(tmp_path.glob("fit-functions-0.*.prof"))
    assert files
    assert pstats.Stats(str(files[0])).total_calls > 0


def test_pytorch_writes_a_trace_of_the_chosen_steps(tmp_path):
    profiler = PyTorchProfiler(tmp_path, "operators", row_limit=5)
    fitted(tmp_path, profiler)
    events = json.loads((tmp_path / "fit-trace-0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("training_step") == 3
    assert "aten::addmm" in names
    assert "Self CPU" in (tmp_path / "fit-operators-0.txt").read_text()


def test_a_module_can_have_actions_of_its_own(tmp_path):
    class Mine(Regression):
        def training_step(self, batch, batch_idx):
            with self.trainer.profiler.profile("mine"):
                return super().training_step(batch, batch_idx)

    profiler = SimpleProfiler()
    trainer(tmp_path, max_epochs=1, profiler=profiler).fit(Mine(), *loaders())
    assert len(profiler.recorded_durations["mine"]) == 8
    trainer(tmp_path, max_epochs=1).fit(Mine(), *loaders())  # without one it costs nothing and is there


def test_a_run_that_fails_leaves_the_profiler_usable(tmp_path):
    class Broken(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ValueError("here")
            return super().training_step(batch, batch_idx)

    for profiler in (SimpleProfiler(tmp_path, "a"), AdvancedProfiler(tmp_path, "b"), PyTorchProfiler(tmp_path, "c")):
        with pytest.raises(TrainingError, match="here"):
            trainer(tmp_path, max_epochs=1, profiler=profiler).fit(Broken(), *loaders())
        trainer(tmp_path, max_epochs=1, profiler=profiler).fit(Regression(), *loaders())


def test_what_is_no_profiler_is_refused():
    assert isinstance(make_profiler(None), PassThroughProfiler)
    with pytest.raises(ConfigError, match=r"profiler.*simple.*advanced.*pytorch"):
        make_profiler("fast")
    with pytest.raises(ConfigError, match="filename"):
        SimpleProfiler(filename="a/b")
    with pytest.raises(TrainingError, match=r"profiler.stop"):
        SimpleProfiler().stop("never started")
