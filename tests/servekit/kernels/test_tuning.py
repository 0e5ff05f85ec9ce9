"""How kernels are launched: a safe default, or what was measured on this device for this shape."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from tests.kernels.backends import DEVICE

from common_platform.errors import ConfigError
from common_platform.kernels import is_interpreted, runs_triton
from servekit.kernels import tuning
from servekit.kernels.tuning import Tuned, tuned

DEFAULT = Tuned(block_n=64, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    def forget():
        tuning._found.cache_clear()
        tuning.configs_of.cache_clear()
        tuning.device_name.cache_clear()

    forget()
    monkeypatch.delenv("SERVEKIT_TUNED", raising=False)
    yield monkeypatch
    monkeypatch.undo()
    forget()


def test_an_unknown_device_or_shape_gets_the_default(tmp_path, fresh):
    assert tuned("k", DEFAULT, head_dim=128) == DEFAULT
    tuning.write(tmp_path, "NVIDIA H100 80GB HBM3", {"k": [{"shape": {"head_dim": 128}, "config": {"num_warps": 8}}]})
    fresh.setenv("SERVEKIT_TUNED", str(tmp_path))
    assert tuned("k", DEFAULT, head_dim=128) == DEFAULT  # this is another device


def test_what_was_measured_on_this_device_is_used_for_its_shape_alone(tmp_path, fresh):
    entry = {"shape": {"head_dim": 128, "groups": 4}, "config": {"num_warps": 8, "block_n": 32}}
    path = tuning.write(tmp_path, tuning.device_name(), {"k": [entry]})
    fresh.setenv("SERVEKIT_TUNED", str(tmp_path))
    assert tuned("k", DEFAULT, groups=4, head_dim=128) == Tuned(block_n=32, num_warps=8, num_stages=2)
    assert tuned("k", DEFAULT, groups=8, head_dim=128) == DEFAULT
    assert tuned("other", DEFAULT, groups=4, head_dim=128) == DEFAULT
    assert json.loads(path.read_text())["device"] == tuning.device_name()


def test_writing_again_keeps_what_it_does_not_measure(tmp_path):
    for kernel, warps in (("a", 2), ("b", 4), ("a", 8)):
        path = tuning.write(tmp_path, "x", {kernel: [{"shape": {"head_dim": 64}, "config": {"num_warps": warps}}]})
    configs = json.loads(path.read_text())["configs"]
    assert {kernel: [one["config"]["num_warps"] for one in found] for kernel, found in configs.items()} == {
        "a": [8],
        "b": [4],
    }


@pytest.mark.parametrize(
    "config", [{"num_warps": 3}, {"num_warps": 64}, {"block_n": 0}, {"colour": 1}, {"num_warps": "8"}]
)
def test_a_file_that_says_nonsense_is_refused_by_name(tmp_path, fresh, config):
    name = tuning.file_name(tuning.device_name())
    body = {"device": "x", "configs": {"k": [{"shape": {"head_dim": 128}, "config": config}]}}
    (tmp_path / name).write_text(json.dumps(body))
    fresh.setenv("SERVEKIT_TUNED", str(tmp_path))
    with pytest.raises(ConfigError, match=name):
        tuned("k", DEFAULT, head_dim=128)


@pytest.mark.skipif(runs_triton(DEVICE) is not None, reason="triton does not run here")
def test_triton_candidates_are_timed_and_the_best_one_is_written(tmp_path, fresh):
    """Times come from a clock that is told what to say; the kernels of every candidate run."""
    from tests.gpu.folders import SHAPES, write_folder

    from servekit.execution.tuning import tune_model
    from servekit.kernels.tune import Space

    folder = write_folder(tmp_path / "model", SHAPES["tiny"], torch.float32, torch.device("cpu"))
    attention = importlib.import_module("servekit.kernels.paged_attention.triton_backend")
    seen = []

    def timer(call):
        call()
        config = tuning.tuned("paged_attention_decode", attention.DECODE, head_dim=16, groups=2)
        if config.block_n == 128:
            raise RuntimeError("out of shared memory")
        seen.append(config.block_n)
        return 1.0 / config.num_warps + config.block_n / 1e4

    space = Space(
        kernel="paged_attention_decode",
        choices={"block_n": (16, 32, 128), "num_warps": (2, 8)},
        rows=2,
        context=20,
        count=1,
    )
    dtype = "float16" if is_interpreted() else "bfloat16"
    lines = list(tune_model(folder, tmp_path / "out", dtype, timer, (space,)))
    assert "2 did not launch" in lines[0]
    fresh.setenv("SERVEKIT_TUNED", str(tmp_path / "out"))
    tuning.configs_of.cache_clear()
    tuning._found.cache_clear()
    found = tuned("paged_attention_decode", attention.DECODE, head_dim=16, groups=2)
    assert (found.block_n, found.num_warps) == (16, 8)
    assert sorted(set(seen)) == [16, 32, 64]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "servekit.cli", "tune", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "one of cuda, rocm, xpu" in done.stderr
