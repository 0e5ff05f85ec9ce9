"""Exported files give the module's numbers, or there is no file."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import trainkit
from common_platform.errors import ConfigError, ExportError, TrainingError

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="no onnx"
)


class Net(trainkit.TrainModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4))
        self.example_input_array = torch.randn(2, 2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Branches(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) if x.sum() > 0 else self.layers(-x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_gives_the_modules_numbers(tmp_path, method):
    module = Net()
    module.train()
    module.to_torchscript(tmp_path / "net.pt", method=method)
    assert module.training and module.layers[1].training
    again = torch.jit.load(str(tmp_path / "net.pt"))
    module.eval()
    torch.testing.assert_close(again(module.example_input), module(module.example_input))


@needs_onnx
def test_onnx_gives_the_modules_numbers(tmp_path):
    module = Net()
    module.to_onnx(tmp_path / "net.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 2, 8)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    module.eval()
    np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@needs_onnx
def test_onnx_of_a_branch_on_values_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ExportError, match="Branches"):
        Branches().to_onnx(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_trace_that_depends_on_values_is_found_out(tmp_path):
    class Random(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) + torch.rand(1)

    with pytest.raises(ExportError, match="differ by"):
        Random().to_torchscript(tmp_path / "net.pt", method="trace", check_trace=False)
    assert not list(tmp_path.iterdir())


def test_an_input_is_needed(tmp_path):
    module = Net()
    module.example_input_array = None
    with pytest.raises(ConfigError, match="example_inputs"):
        module.to_torchscript(method="trace")
    with pytest.raises(TrainingError, match="input_sample"):
        module.to_onnx(tmp_path / "net.onnx")
