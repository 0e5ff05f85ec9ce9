"""The size of the KV pool, by what a device says: a device that is told what to say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import make_folder

from common_platform.errors import ConfigError
from servekit.execution.choices import ExecutorConfig
from servekit.execution.device_memory import profile_memory
from servekit.execution.executor import InProcessExecutor

GIB = 1 << 30


class ToldMemory:
    """A device of ``total`` bytes, where others hold some, the weights take some, and a step some more."""

    def __init__(self, total: int, others: int, weights: int, step: int) -> None:
        self._total, self._others, self._weights, self._step = total, others, weights, step
        self._peak = weights

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - self._others - self._weights

    def allocated(self) -> int:
        return self._weights

    def peak(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._weights

    def run_step(self) -> None:
        self._peak = self._weights + self._step


@given(
    st.integers(0, 20 * GIB),
    st.integers(GIB, 30 * GIB),
    st.integers(1, 5 * GIB),
    st.floats(0.05, 1.0, exclude_min=True),
)
def test_all_together_stay_within_the_share(others, weights, step, share):
    memory = ToldMemory(80 * GIB, others, weights, step)
    reserve = GIB // 4
    wanted = int(80 * GIB * share) - others - weights - step - reserve
    if wanted <= 0:
        with pytest.raises(ConfigError, match="gpu_memory_utilization"):
            profile_memory(memory, memory.run_step, share, reserve)
        return
    found = profile_memory(memory, memory.run_step, share, reserve)
    assert found.for_cache == wanted
    assert found.step == step


def test_the_executor_runs_the_largest_step_and_leaves_no_cache_behind(tmp_path):
    executor = InProcessExecutor(
        make_folder(tmp_path, vocab_size=300), ExecutorConfig(device="cpu", kernels="reference")
    )
    seen = []

    class Watched(ToldMemory):
        def peak(self) -> int:
            seen.append([attention.cache.numel() for attention in executor.model.attentions])
            return super().peak()

    try:
        profile = executor.profile(0.9, 200, 8, Watched(80 * GIB, 0, GIB, 0))
        assert profile.for_cache > 70 * GIB
        assert seen == [[0, 0]]
        assert len(executor.score([5, 6, 7])) == 2
    finally:
        executor.stop()


def test_what_a_platform_can_decides_what_is_recorded(tmp_path):
    executor = InProcessExecutor(make_folder(tmp_path, vocab_size=300), ExecutorConfig())
    try:
        assert executor.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert executor.platform.graph_capture or executor._recorder() is None
    finally:
        executor.stop()
