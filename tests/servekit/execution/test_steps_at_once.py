"""Which steps run where they are planned, and which in a thread of their own."""

from __future__ import annotations

from tests.tiny import make_folder

from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.plan import RowStart, StepPlan
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import Finished, InProcessExecutor
from servekit.sampling.parameters import SamplingParams


def test_a_step_of_few_tokens_runs_at_once_and_a_prompt_does_not(tmp_path):
    """Who plans takes in messages too, which should not wait for the prompt of a single row."""
    executor = InProcessExecutor(make_folder(tmp_path / "model"), ExecutorConfig())
    try:
        executor.start(CacheConfig(block_size=16, num_blocks=8), SchedulerConfig(max_num_seqs=4))
        ids = list(range(3, 43))
        row = RowStart(0, "r", ids, len(ids), 0, [[1, 2, 3]], SamplingParams(temperature=0), [])
        prompt = executor.submit(StepPlan(0, [0], [len(ids)], [True], starts=[row]))
        assert not isinstance(prompt, Finished)
        assert len(prompt.result(60).sampled) == 1
        one = executor.submit(StepPlan(1, [0], [1], [True]))
        assert isinstance(one, Finished)
        assert len(one.result().sampled) == 1
    finally:
        executor.stop()
