"""What callbacks measure beside training."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, loaders, trainer

from common_platform import errors
from trainkit.callbacks import (
    Callback,
    DeviceStatsMonitor,
    GradNorm,
    SpikeDetection,
    ThroughputMonitor,
    TQDMProgressBar,
    callback_class,
    make_callback,
    registry,
)
from trainkit.callbacks.grad_norm import grad_norm
from trainkit.callbacks.spike import TrainingSpikeException
from trainkit.callbacks.throughput_monitor import Throughput
from trainkit.device_stats import Energy
from trainkit.flops import available_flops, measure_flops


def rows(fit) -> list[dict[str, str]]:
    with Path(fit.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def columns(fit, part: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows(fit):
        for name, value in row.items():
            if part in name and value:
                found.setdefault(name, []).append(float(value))
    return found


def test_device_stats_have_lightnings_names(tmp_path):
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DeviceStatsMonitor()])
    fit.fit(Regression(), *loaders())
    found = columns(fit, "DeviceStatsMonitor.")
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        for name in ("cpu_percent", "cpu_vm_percent", "cpu_swap_percent"):
            values = found[f"DeviceStatsMonitor.{hook}/{name}"]
            assert values
            assert all(0 <= value <= 100 for value in values)
    with pytest.raises(errors.ConfigError, match="logger.*DeviceStatsMonitor"):
        trainer(tmp_path, logger=False, callbacks=[DeviceStatsMonitor()]).fit(Regression(), loaders()[0])


def test_energy_is_counted_over_the_counters_end(tmp_path):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # the cores, which the package has counted
    (package / "max_energy_range_uj").write_text("10000000")
    counter = package / "energy_uj"
    counter.write_text("9000000")
    energy = Energy(torch.device("cpu"), tmp_path)
    counter.write_text("9500000")
    assert energy.joules() == {"energy_cpu0_j": pytest.approx(0.5)}
    counter.write_text("500000")
    assert energy.joules() == {"energy_cpu0_j": pytest.approx(1.5)}
    assert Energy(torch.device("cpu"), tmp_path / "nowhere").joules() == {}


@given(st.lists(st.tuples(st.floats(0.01, 2.0), st.integers(1, 9)), min_size=2, max_size=30), st.integers(2, 12))
def test_rates_are_of_the_newest_counts(steps, window):
    measured = Throughput(available_flops=1000.0, world_size=2, window_size=window)
    now = samples = 0.0
    for number, (seconds, size) in enumerate(steps):
        now, samples = now + seconds, samples + size
        measured.update(time=now, batches=number + 1, samples=int(samples), lengths=int(samples) * 3, flops=50.0)
    newest = steps[-(window - 1) :] if len(steps) >= window else steps[1:]
    elapsed = sum(seconds for seconds, _ in newest)
    found = measured.compute()
    assert found["device/batches_per_sec"] == pytest.approx(len(newest) / elapsed)
    assert found["samples_per_sec"] == pytest.approx(2 * sum(size for _, size in newest) / elapsed)
    assert found["device/items_per_sec"] == pytest.approx(3 * sum(size for _, size in newest) / elapsed)
    assert found["device/mfu"] == pytest.approx(50.0 * len(newest) / elapsed / 1000.0)


class Counted(Regression):
    flops_per_batch = 1000


def test_throughput_is_logged_without_the_time_of_validation(tmp_path):
    class Slow(Counted):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.05)

    monitor = ThroughputMonitor(lambda batch: len(batch[0]), lambda batch: batch[0].numel(), window_size=4)
    fit = trainer(tmp_path, max_epochs=2, val_check_interval=2, callbacks=[monitor])
    began = time.perf_counter()
    fit.fit(Slow(), *loaders())
    took = time.perf_counter() - began
    found = columns(fit, "train/")
    assert found["train/samples"] == [8.0 * (n + 1) for n in range(16)]
    assert found["train/lengths"][-1] == 16 * 8 * 4
    assert 0 < found["train/time"][-1] < took - 8 * 3 * 0.05
    assert all(0 < value < 1 for value in found["train/device/mfu"])
    assert columns(fit, "validate/")["validate/batches"] == [3.0] * 8
    with pytest.raises(errors.TrainingError, match="batch_size_fn"):
        trainer(tmp_path, max_epochs=1, callbacks=[ThroughputMonitor(lambda _: 0)]).fit(Regression(), loaders()[0])


def test_operations_are_counted_without_running_them():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    forward = 2 * 3 * 8 * 4
    assert measure_flops(layer, lambda: layer(x)) == forward
    assert measure_flops(layer, lambda: layer(x), lambda y: y.sum()) == 2 * forward  # x needs no gradient
    assert available_flops(torch.device("cpu"), torch.float32) > 1e8


def test_norms_of_gradients_are_logged_before_they_are_clipped(tmp_path):
    class Norms(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in pl_module.parameters())))

    norms = Norms()
    how = {"callbacks": [GradNorm(each_parameter=True), norms], "gradient_clip_val": 1e-4, "log_every_n_steps": 3}
    fit = trainer(tmp_path, max_epochs=1, **how)
    fit.fit(Regression(), loaders()[0])
    found = columns(fit, "grad_")
    assert found["grad_2.0_norm_total"] == pytest.approx([norms.seen[2], norms.seen[5]], rel=1e-5)
    assert len(found) == 1 + len(list(Regression().parameters()))


def test_the_norm_of_norms_is_the_norm():
    module = Regression()
    module.loss(next(iter(loaders()[0]))).backward()
    flat = torch.cat([p.grad.flatten() for p in module.parameters()])
    for kind, wanted in ((1, flat.abs().sum()), (2, flat.norm()), ("inf", flat.abs().max())):
        assert grad_norm(module, kind)[f"grad_{float(kind)}_norm_total"] == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(errors.ConfigError, match="norm_type"):
        grad_norm(module, 0)


class Jumps(Regression):
    def __init__(self, at: int) -> None:
        super().__init__(dropout=0.0)
        self.at = at

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (1000 if batch_idx == self.at else 1)


def test_a_jump_of_the_loss_ends_the_run_and_is_written_down(tmp_path):
    spikes = SpikeDetection()
    with pytest.raises(TrainingSpikeException, match=r"batch 5") as raised:
        trainer(tmp_path, max_epochs=1, callbacks=[spikes]).fit(Jumps(5), loaders()[0])
    assert raised.value.batch_idx == 5
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [4, 5]
    again = SpikeDetection()
    again.load_state_dict(spikes.state_dict())
    assert again.state_dict() == spikes.state_dict()


def test_a_jump_is_none_where_it_is_better_small_or_early(tmp_path):
    for spikes in (SpikeDetection("max"), SpikeDetection(atol=1e9), SpikeDetection(warmup=6)):
        trainer(tmp_path, max_epochs=1, callbacks=[spikes]).fit(Jumps(5), loaders()[0])
        assert not spikes.bad_batches


def test_the_bar_of_tqdm_counts_batches_and_shows_metrics(tmp_path, capsys):
    pytest.importorskip("tqdm")

    class Shows(Regression):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("shown", loss, prog_bar=True)
            return loss

    fit = trainer(tmp_path, max_epochs=2, enable_progress_bar=True, callbacks=[TQDMProgressBar(leave=True)])
    fit.fit(Shows(), *loaders())
    err = capsys.readouterr().err
    for text in ("Epoch 0: 100%", "Epoch 1: 100%", "8/8", "shown=", "Validation", "v_num=0"):
        assert text in err
    quiet = TQDMProgressBar(refresh_rate=0)
    trainer(tmp_path, max_epochs=1, enable_progress_bar=True, callbacks=[quiet]).fit(Shows(), *loaders())
    assert "Epoch" not in capsys.readouterr().err


# --- callbacks by name ---


def test_every_name_is_a_callback():
    for name in registry.BUILT_IN:
        assert issubclass(callback_class(name), Callback)
        assert callback_class(name).__name__ == name


def test_names_and_arguments_make_callbacks(tmp_path):
    given = ["GradNorm", {"name": "EarlyStopping", "monitor": "val_loss", "patience": 7}]
    fit = trainer(tmp_path, callbacks=given)
    assert [type(c).__name__ for c in fit.callbacks] == ["GradNorm", "EarlyStopping", "ModelCheckpoint"]
    assert fit.early_stopping_callback.patience == 7
    for wrong, says in (
        ("Early", "EarlyStopping"),
        ({"patience": 3}, "name"),
        ({"name": "GradNorm", "x": 1}, "GradNorm"),
    ):
        with pytest.raises(errors.ConfigError, match=says):
            make_callback(wrong)


class Installed(Callback):
    """As if it came from a package."""


def test_packages_bring_names_and_callbacks_for_every_trainer(tmp_path, monkeypatch):
    points = {
        registry.GROUP: [SimpleNamespace(name="installed", value=f"{__name__}:Installed")],
        registry.FACTORIES: [SimpleNamespace(load=lambda: lambda: [Installed()])],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    monkeypatch.setattr(registry, "resolve_name", lambda where: Installed if where.endswith("Installed") else None)
    assert callback_class("installed") is Installed
    assert [type(c).__name__ for c in trainer(tmp_path).callbacks] == ["Installed", "ModelCheckpoint"]
