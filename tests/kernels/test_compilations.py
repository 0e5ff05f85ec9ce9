"""Kernels that are compiled meanwhile are told by Triton's own hook, which whoever had it keeps."""

from __future__ import annotations

import importlib.util

import pytest

from common_platform.kernels import compilations, specializations_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not here")


def compiled(kernel: str) -> None:
    """As ``JITFunction._call_hook`` tells it once a kernel is ready."""
    from triton import knobs
    from triton.runtime.jit import JitFunctionInfo

    hook = knobs.runtime.jit_post_compile_hook
    if hook is not None:
        told = {"key": "k", "repr": f"{kernel}[num_warps=4](x: *fp32)", "compile": {}, "is_manual_warmup": False}
        hook(fn=JitFunctionInfo("servekit.kernels", kernel, None), already_compiled=False, **told)


def test_what_is_compiled_meanwhile_is_told_and_nothing_else():
    compiled("_before")
    with compilations() as outer:
        compiled("_one")
        with compilations() as inner:
            compiled("_two")
        compiled("_three")
    compiled("_after")
    assert inner == ["servekit.kernels._two[num_warps=4](x: *fp32)"]
    assert [name.partition("[")[0].rpartition(".")[2] for name in outer] == ["_one", "_two", "_three"]


def test_triton_has_the_hook_that_is_listened_to():
    from triton import knobs

    assert specializations_of("servekit")
    assert "jit_post_compile_hook" in type(knobs.runtime).__annotations__
