"""Detection finds what drivers say is there, and never raises because of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common_platform.errors import ConfigError, DeviceError
from common_platform.platforms import detect, queries

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("COMMON_PLATFORM", raising=False)


def fake_cuda(monkeypatch, *, hip=None, capability=(9, 0), arch=""):
    """What the driver query of a machine with two devices returns."""
    about = SimpleNamespace(name="Fake Accelerator", gcnArchName=arch)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: capability >= (8, 0))


def test_cuda(monkeypatch):
    fake_cuda(monkeypatch)
    platform = detect()
    assert (platform.name, platform.device_type, platform.collective_backend) == ("cuda", "cuda", "nccl")
    assert platform.graph_capture
    assert [d.capability for d in platform.devices] == ["9.0", "9.0"]
    assert platform.devices[1].memory_free == 60 * GIB
    assert {"bfloat16", "float8_e4m3fn"} <= set(platform.dtypes)
    assert platform.found == ("cuda: 2 x Fake Accelerator",)


def test_an_old_cuda_device_has_no_bfloat16(monkeypatch):
    fake_cuda(monkeypatch, capability=(7, 0))
    assert "bfloat16" not in detect().dtypes


def test_rocm(monkeypatch):
    fake_cuda(monkeypatch, hip="6.4", arch="gfx942")
    platform = detect()
    assert (platform.name, platform.device_type, platform.collective_backend) == ("rocm", "cuda", "nccl")
    assert platform.devices[0].capability == "gfx942"
    assert platform.found == ("cuda: not here", "rocm: 2 x Fake Accelerator")


@pytest.mark.parametrize(
    ("hip", "capability", "arch", "has_it"),
    [
        (None, (8, 0), "", False),
        (None, (8, 9), "", True),
        (None, (10, 0), "", True),
        ("6.4", (9, 0), "gfx90a:sramecc+:xnack-", False),
        ("6.4", (9, 4), "gfx942:sramecc+:xnack-", True),
        ("6.4", (9, 5), "gfx950", True),
        ("6.4", (11, 0), "gfx1100", False),
        ("6.4", (12, 0), "gfx1201", True),
    ],
)
def test_float8_is_a_fact_of_devices_that_multiply_it(monkeypatch, hip, capability, arch, has_it):
    """AMD's numbers of capability are no measure: an MI200 says 9.0, as a Hopper does."""
    fake_cuda(monkeypatch, hip=hip, capability=capability, arch=arch)
    assert ("float8_e4m3fn" in detect().dtypes) is has_it


def test_xpu(monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    about = SimpleNamespace(name="Fake Arc", total_memory=16 * GIB)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda index: GIB)
    platform = detect("xpu")
    assert (platform.device_type, platform.collective_backend) == ("xpu", "xccl")
    assert platform.devices[0].memory_free == 15 * GIB


def test_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert detect("mps").device_type == "mps"


def test_a_broken_driver_is_said_once_and_the_cpu_is_used(monkeypatch):
    def broken() -> bool:
        raise RuntimeError("driver version is insufficient")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    platform = detect("cpu") if torch.version.hip else detect()
    assert platform.name == "cpu"
    assert sum("driver version is insufficient" in line for line in platform.found) == 1


def test_the_cpu_is_always_there():
    platform = queries.cpu()
    assert platform.devices[0].memory_total >= platform.devices[0].memory_free > 0
    assert platform.collective_backend == "gloo"
    assert "float32" in platform.dtypes


def test_the_override(monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setenv("COMMON_PLATFORM", "cpu")
    assert detect().name == "cpu"
    monkeypatch.setenv("COMMON_PLATFORM", "abacus")
    with pytest.raises(ConfigError, match="cuda, rocm, xpu, mps, cpu"):
        detect()


def test_a_forced_device_that_is_not_here_is_an_error_not_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="xpu: not here"):
        detect("xpu")


def test_the_report_for_people_and_for_machines():
    command = [sys.executable, "-m", "common_platform"]
    environment = os.environ | {"COMMON_PLATFORM": "cpu"}
    table = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert table.returncode == 0
    assert "platform" in table.stdout
    found = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, env=environment)
    assert json.loads(found.stdout)["name"] == "cpu"
    wrong = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment | {"COMMON_PLATFORM": "x"}
    )
    assert (wrong.returncode, wrong.stdout) == (3, "")
    assert wrong.stderr.startswith("error: COMMON_PLATFORM: got x")
