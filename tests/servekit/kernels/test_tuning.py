"""How kernels are launched: a safe default, or what was measured on this device for this shape."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.kernels.backends import DEVICE, multiplies_float8

from common_platform.errors import ConfigError
from common_platform.kernels import is_interpreted, runs_triton
from servekit.kernels import tuning
from servekit.kernels.tuning import Tuned, tuned

DEFAULT = Tuned(block_n=64, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    def forget():
        tuning._found.cache_clear()
        tuning.measured_on.cache_clear()
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
    from servekit.kernels.spaces import attention_space

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

    def spaces(sizes, dtype, device, kinds, float8):
        space = attention_space("decode", sizes, dtype, device, rows=2, context=20, count=1)
        yield replace(space, choices={"block_n": (16, 32, 128), "num_warps": (2, 8)})

    dtype = "float16" if is_interpreted() else "bfloat16"
    lines = list(tune_model(folder, tmp_path / "out", dtype, (), timer, spaces))
    assert "2 did not launch" in lines[0]
    fresh.setenv("SERVEKIT_TUNED", str(tmp_path / "out"))
    tuning.measured_on.cache_clear()
    tuning._found.cache_clear()
    found = tuned("paged_attention_decode", attention.DECODE, head_dim=16, groups=2)
    assert (found.block_n, found.num_warps) == (16, 8)
    assert sorted(set(seen)) == [16, 32, 64]


TUNED_KINDS = [("linear", "int8"), ("linear", "fp8"), ("linear", "int4")]
TUNED_KINDS += [("experts", kind) for kind in ("dense", "int8", "w8a8", "fp8", "int4")]


def space_of(what, kind, dtype):
    from servekit.kernels import spaces

    if what == "linear":
        space = spaces.linear_space(kind, 3, 128, 256, dtype, DEVICE, torch.float8_e4m3fn)
    else:
        space = next(spaces.expert_spaces(kind, 3, (4, 2, 128, 128), dtype, DEVICE))
    return replace(space, choices={"block_n": (32, 64), "num_warps": (2, 8)})


@pytest.mark.skipif(runs_triton(DEVICE) is not None, reason="triton does not run here")
@pytest.mark.parametrize(("what", "kind"), TUNED_KINDS)
def test_triton_products_are_launched_as_the_file_says_that_tune_wrote(tmp_path, fresh, what, kind):
    """Found by times that grow with the columns and fall with the warps; another device keeps its defaults."""
    if kind == "fp8" and not multiplies_float8():
        pytest.skip("this device does not have float8")
    from servekit.kernels.tune import entries, tune

    linear = "triton_w4" if kind == "int4" else "triton_w8"
    launcher = f"quantized_linear.{linear}" if what == "linear" else "fused_moe.triton_backend"
    module = importlib.import_module(f"servekit.kernels.{launcher}")
    launched, choose = [], module.measured_tiles
    fresh.setattr(module, "measured_tiles", lambda *a, **k: (launched.append(choose(*a, **k)), launched[-1])[1])

    def run(call):
        launched.clear()
        return call()

    def timer(call):
        run(call)
        return sum(cut.cols / 64 + 1 / cut.num_warps for cut in launched)

    torch.manual_seed(0)
    space = space_of(what, kind, torch.float16 if is_interpreted() else torch.bfloat16)
    call = space.make()
    before, by_default = run(call), launched[0]
    tuning.write(tmp_path, tuning.device_name(), entries([tune(space, timer)]))
    tuning._found.cache_clear()
    fresh.setenv("SERVEKIT_TUNED", str(tmp_path))
    tuning.measured_on.cache_clear()
    after = run(call)
    assert (launched[0].cols, launched[0].num_warps) == (32, 8)
    assert launched[0] != by_default
    torch.testing.assert_close(after, before)
    fresh.setattr(tuning, "device_name", lambda: "another")
    run(call)
    assert launched[0] == by_default


def test_tune_knows_the_sizes_of_dense_models_and_of_mixtures(tmp_path):
    from tests.gpu.folders import SHAPES, write_folder

    from common_platform.artifact import open_model_folder
    from servekit.execution.tuning import sizes_of

    folder = write_folder(tmp_path / "model", SHAPES["tiny"], torch.float32, torch.device("cpu"))
    with open_model_folder(folder, verify=False) as opened:
        dense = sizes_of(opened)
    assert dense.linears == ((128, 64), (64, 64), (192, 64), (64, 96))
    assert dense.experts is None
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    with open_model_folder(folder, verify=False) as opened:
        mixture = sizes_of(opened)
    assert mixture.experts == (8, 2, 64, 48)
    assert mixture.linears == dense.linears[:2]


@pytest.mark.parametrize(
    ("number", "expected"), [(1, 1), (2, 4), (4, 4), (5, 16), (64, 64), (65, 256), (1 << 20, 65536)]
)
def test_a_number_of_tokens_is_looked_up_by_the_next_power_of_four(number, expected):
    assert tuning.bucket(number) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "servekit.cli", "tune", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "one of cuda, rocm, xpu" in done.stderr
