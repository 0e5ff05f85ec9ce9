"""Every Triton kernel compiles to the binary of each device that it is for, without spills, within shared memory."""

from __future__ import annotations

import importlib.util

import pytest

from common_platform.kernels import TARGETS, is_interpreted, specializations_of

pytestmark = pytest.mark.skipif(
    is_interpreted() or importlib.util.find_spec("triton") is None, reason="kernels are compiled where triton is"
)


def _cases() -> list[object]:
    if is_interpreted() or importlib.util.find_spec("triton") is None:
        return []
    return [
        pytest.param(one, id=f"{package}/{operation}: {one.title}")
        for package in ("servekit", "trainkit")
        for operation, one in specializations_of(package)
    ]


@pytest.mark.parametrize("specialization", _cases())
def test_compiles_for_every_device_without_spills(specialization):
    from common_platform.kernels.compiling import compile_for

    for name in specialization.targets:
        compiled = compile_for(specialization, name)
        where = f"{specialization.title} for {name}: {compiled}"
        assert compiled.binary > 0, where
        assert compiled.spills == 0, where
        assert compiled.shared <= TARGETS[name].shared_limit, where


def test_every_backend_of_a_kernel_declares_how_it_is_compiled():
    for package in ("servekit", "trainkit"):
        declared = specializations_of(package)
        assert all(one.signature for _, one in declared)
    assert {operation for operation, _ in specializations_of("servekit")} >= {
        "logits",
        "paged_attention",
        "rms_norm",
        "rope_kv_write",
        "sample",
        "silu_and_mul",
    }
