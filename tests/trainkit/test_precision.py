"""Precisions by name: what a device can do, what a library must bring, and what plugins add."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.trainkit.tiny import Regression, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common_platform import errors
from trainkit.precision import FP8Precision, Precision, choose, fp8, make_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["transformer-engine", "apex", "xla-true", "xla-bf16"])
def test_what_a_plugin_must_bring_is_named(tmp_path, name):
    with pytest.raises(errors.ResourceError, match=f"{name}.*trainkit.precision.*(NVIDIA|torch_xla)"):
        trainer(tmp_path, precision=name)


class Brought(Precision):
    name = "brought"


def test_a_plugin_brings_a_precision(tmp_path, monkeypatch):
    points = [SimpleNamespace(name="apex", load=lambda: lambda device: Brought())]
    monkeypatch.setattr(choose, "entry_points", lambda group: points)
    assert trainer(tmp_path, precision="apex").precision == "brought"
    points[0] = SimpleNamespace(name="apex", load=lambda: lambda device: object())
    with pytest.raises(errors.ConfigError, match=r"apex.*Precision"):
        trainer(tmp_path, precision="apex")


@pytest.mark.parametrize(
    ("device", "dtypes", "wanted"),
    [
        ("cpu", ("float32", "bfloat16"), "32-true"),
        ("cuda", ("float32", "float16", "bfloat16"), "bf16-mixed"),
        ("cuda", ("float32", "float16"), "16-mixed"),
        ("mps", ("float32",), "32-true"),
    ],
)
def test_auto_goes_by_the_facts_of_the_platform(monkeypatch, device, dtypes, wanted):
    monkeypatch.setattr(choose, "detect", lambda kind: SimpleNamespace(dtypes=dtypes))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind: SimpleNamespace())
    assert make_precision("auto", torch.device(device)).name == wanted


def test_a_device_without_eight_bits_is_refused(monkeypatch):
    pytest.importorskip("torchao")
    with pytest.raises(errors.DeviceError, match=r"fp8 on cpu.*float8_e4m3fn.*emulate"):
        make_precision("fp8", CPU)
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(errors.ResourceError, match="torchao"):
        make_precision("fp8", CPU)


class Wide(Regression):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_layers_that_fit_multiply_in_eight_bits_and_learn(tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    loader = DataLoader(TensorDataset(x, x.mean(1, keepdim=True)), 16)
    module = Wide()
    names, before = list(module.state_dict()), float(module.loss((x, x.mean(1, keepdim=True))))
    fit = trainer(tmp_path, max_epochs=20, plugins=FP8Precision(CPU, emulate=True), enable_checkpointing=False)
    fit.fit(module, loader)
    kinds = [type(layer).__name__ for layer in module.net]
    assert kinds == ["Float8Linear", "Tanh", "Float8Linear", "Linear"]
    assert list(module.state_dict()) == names
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert float(module.loss((x, x.mean(1, keepdim=True)))) < before / 2
    fit.validate(module, loader, verbose=False)
    plain = Wide()
    plain.load_state_dict(module.state_dict())
    with pytest.raises(errors.ConfigError, match="multiples of 16"):
        trainer(tmp_path, max_epochs=1, plugins=FP8Precision(CPU, emulate=True)).fit(Regression(), loader)
