"""Recorded steps: which bucket a step takes, and that a replay computes what the step itself would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.servekit.execution.recorded_ops import OpsRecorder
from tests.tiny import make_folder

from common_platform.artifact import open_model_folder
from common_platform.errors import ConfigError
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.plan import BlockAppend, RowStart, StepPlan
from servekit.execution.graphs import GraphedForward, GraphSizes, bucket_of, buckets
from servekit.execution.model_runner import ModelRunner
from servekit.kernels.paged_attention.metadata import AttentionMetadata, paged_metadata
from servekit.layers.kernels import Kernels
from servekit.layers.parallel import SingleRank
from servekit.layers.weights import Weights
from servekit.models.registry import architecture_of, model_class
from servekit.sampling.parameters import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_every_size_has_the_smallest_bucket_that_holds_it(most, wanted):
    sizes = buckets(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == most
    found = bucket_of(wanted, sizes)
    assert found == min((size for size in sizes if size >= wanted), default=None)
    if found is not None and wanted >= 64:
        assert found <= wanted * 1.25  # little is wasted


def test_sizes_that_do_not_grow_are_refused():
    with pytest.raises(ConfigError, match=r"graphs\.decode"):
        GraphSizes(decode=(4, 2), piecewise=())


def table_attention(query, cache, metadata: AttentionMetadata, scale, soft_cap=0.0):
    """Attention that reads its rows from tensors alone, as a device's kernel does, in torch's own operations."""
    paged = metadata.paged
    size, tokens = cache.shape[2], len(query)
    at = torch.arange(tokens)
    row = (at[:, None] >= paged.firsts[None, 1:]).sum(dim=1).clamp(max=len(paged.contexts) - 1)
    position = paged.contexts[row] - paged.firsts[row + 1] + at
    keys, values = (half[paged.tables[row].long()].flatten(1, 2) for half in cache)
    groups = query.shape[1] // cache.shape[3]
    keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
    scores = torch.einsum("thd,tkhd->thk", query, keys) * scale
    where = torch.arange(paged.tables.shape[1] * size)
    seen = where[None] <= position[:, None]
    if paged.window:
        seen = seen & (where[None] > position[:, None] - paged.window)
    scores = scores.masked_fill(~seen[:, None], -1e30)
    return torch.einsum("thk,tkhd->thd", scores.softmax(-1), values)


KERNELS = Kernels(paged_attention=table_attention, build_metadata=paged_metadata)


@pytest.fixture(scope="module", params=["llama", "mistral-window"])
def path(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("graphs") / "model", request.param, vocab_size=300)


def make_runner(path, recorder):
    with open_model_folder(path) as folder, torch.inference_mode():
        weights = Weights(folder, torch.float32, CPU, SingleRank(), KERNELS)
        model = model_class(architecture_of(folder))(weights, 256)
        cache, scheduler = CacheConfig(num_blocks=30), SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=48)
        return ModelRunner(model, cache, scheduler, torch.float32, CPU, kernels=KERNELS, recorder=recorder)


def plans(num_groups):
    """Prefills of different lengths, a chunk beside a decode, then decodes of two, three and two rows."""

    def start(slot, ids, blocks):
        return RowStart(slot, f"r{slot}", ids, len(ids), 0, [blocks] * num_groups, GREEDY, [])

    first = [start(0, list(range(5, 22)), [1, 2]), start(3, [7, 8, 9], [3])]
    yield StepPlan(0, [0, 3], [17, 3], [True, True], starts=first)
    yield StepPlan(1, [0, 3], [1, 1], [True, True])
    yield StepPlan(2, [0, 3, 1], [1, 1, 9], [True, True, False], starts=[start(1, list(range(40, 60)), [4, 5])])
    yield StepPlan(3, [1, 3], [11, 1], [True, True])
    yield StepPlan(4, [0, 1, 3], [1, 1, 1], [True, True, True])
    for step in range(5, 18):
        appends = [BlockAppend(3, group, [6]) for group in range(num_groups)] if step == 12 else []
        yield StepPlan(step, [3, 1], [1, 1], [True, True], ends=[0] if step == 5 else [], appends=appends)


def test_replays_sample_what_the_steps_themselves_would(path):
    recorder = OpsRecorder()
    graphed, plain = make_runner(path, recorder), make_runner(path, None)
    forward = graphed.forward
    assert isinstance(forward, GraphedForward)
    groups = len(graphed.model.kv_groups)
    layers = len(graphed.model.attentions)
    sizes = forward.sizes
    assert recorder.num_recordings == len(sizes.decode) + len(sizes.piecewise) * (layers + 1)
    recorded = recorder.num_recordings
    for plan in plans(groups):
        assert graphed.execute(plan).sampled == plain.execute(plan).sampled
    assert recorder.num_recordings == recorded, "nothing is recorded while requests are served"
    assert (forward.num_replays, forward.num_eager) == (18, 0)


WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


def test_nothing_that_is_recorded_makes_the_host_wait_for_the_device(path):
    """A device refuses to record such an operation; a CPU does not mind."""
    recorder = OpsRecorder()
    make_runner(path, recorder)
    assert recorder.names & {"mm", "linear"}
    assert not recorder.names & WAITING


def test_a_step_larger_than_every_bucket_runs_as_it_is(path):
    graphed = make_runner(path, OpsRecorder())
    ids = list(np.arange(60) % 250 + 3)  # the largest size recorded is 32
    start = RowStart(0, "r", ids, 60, 0, [[1, 2, 3, 4]] * len(graphed.model.kv_groups), GREEDY, [])
    assert len(graphed.execute(StepPlan(0, [0], [60], [True], starts=[start])).sampled) == 1
    assert graphed.forward.num_eager == 1
