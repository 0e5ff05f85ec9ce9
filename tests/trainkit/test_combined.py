"""Combined loaders give what Lightning's give, and go on in the middle of an epoch."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, child_environment, dataset, loaders, trainer
from torch.utils.data import DataLoader, IterableDataset

from common_platform import errors
from trainkit.callbacks import Callback, ModelCheckpoint
from trainkit.data import CombinedLoader, ShardedIterable, measured_num_workers, suggested_num_workers
from trainkit.data.sharded import shard_of

SCRIPT = Path(__file__).parent / "parity" / "combined.py"
LIGHTNING = Path(__file__).parents[2] / ".peers" / "lightning" / "bin" / "python"
CASES = [[4], [3, 5], [5, 3], [4, 4], [1, 7, 4], [6, 1, 3], [2, 9, 9]]


def run(python: Path | str, library: str, folder: Path) -> dict:
    command = [str(python), str(SCRIPT), library, str(folder), json.dumps(CASES)]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_orders_lengths_losses_and_metrics_are_lightnings(tmp_path):
    if not LIGHTNING.exists():
        pytest.skip("no environment of Lightning: nox -s peers -- lightning")
    ours, theirs = run(sys.executable, "trainkit", tmp_path / "a"), run(LIGHTNING, "lightning", tmp_path / "b")
    assert ours.keys() == theirs.keys()
    for case, found in ours.items():
        assert found == theirs[case], case


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(sizes, st.sampled_from(["min_size", "max_size", "max_size_cycle", "sequential"]))
def test_every_batch_comes_as_often_as_the_mode_says(lengths, mode):
    parts = [[(i, n) for n in range(length)] for i, length in enumerate(lengths)]
    rows = [batch for batch, _, _ in CombinedLoader(parts_as_loaders(parts), mode)]
    columns = [rows] if mode == "sequential" else list(zip(*rows, strict=True))
    if mode == "sequential":
        assert rows == [item for part in parts for item in part]
        return
    length = min(lengths) if mode == "min_size" else max(lengths)
    for part, column in zip(parts, columns, strict=True):
        again = part * (length // len(part) + 1) if mode == "max_size_cycle" else [*part, *[None] * length]
        assert list(column) == again[:length]


class Batches:
    """A loader as small as it can be."""

    sampler = None

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def parts_as_loaders(parts):
    return [Batches(part) for part in parts]


class Two(Regression):
    """Random order, dropout and noise: whatever is drawn at another moment shows."""

    def training_step(self, batch, batch_idx):
        loss = sum(self.loss(part) for part in batch.values() if part is not None)
        self.log("train_loss", loss, batch_size=1)
        return loss


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        for x, y in zip(*dataset(self.count).tensors, strict=True):
            yield x + 0.01 * torch.randn(4), y


def keeps(root):
    return ModelCheckpoint(root, every_n_train_steps=1)


class Stops(Callback):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.progress.total_batches == self.at:
            raise KeyboardInterrupt


def form(kind: str):
    generator = torch.Generator().manual_seed(9)
    own = DataLoader(dataset(10), 4, shuffle=True, generator=generator)
    other = DataLoader(Stream(26), 3) if kind == "stream" else DataLoader(dataset(26, 1), 3, shuffle=True)
    return {"short": own, "long": other}


def fitted(root, kind: str, mode: str, stop: int | None = None, *, resume: bool = False):
    torch.manual_seed(2)
    module = Two()
    fit = trainer(root, max_epochs=2, callbacks=[Stops(stop), keeps(root)], logger=False)
    try:
        fit.fit(module, CombinedLoader(form(kind), mode), ckpt_path="last" if resume else None)
    except KeyboardInterrupt:
        return None
    return [*module.state_dict().values(), torch.get_rng_state()]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["shuffled", "stream"]),
    st.sampled_from(["min_size", "max_size", "max_size_cycle"]),
    st.integers(1, 11),
)
def test_a_resumed_run_is_the_run(tmp_path_factory, kind, mode, stop):
    root = tmp_path_factory.mktemp("run")
    whole = fitted(tmp_path_factory.mktemp("whole"), kind, mode)
    found = fitted(root, kind, mode, stop)
    if found is None:
        found = fitted(root, kind, mode, resume=True)
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stop", [1, 5, 8, 9, 12])
@pytest.mark.parametrize("kind", ["generator", "prefetch", "workers"])
def test_loaders_with_a_generator_and_batches_read_ahead_resume_exactly(tmp_path, kind, stop):
    def weights(stop=None, resume=None):
        torch.manual_seed(2)
        own = torch.Generator().manual_seed(9) if kind == "generator" else None
        loader = DataLoader(dataset(), 8, shuffle=True, generator=own, num_workers=2 * (kind == "workers"))
        module, ahead = Regression(), True if kind == "prefetch" else None
        callbacks = [Stops(stop), keeps(tmp_path / str(stop or resume))]
        fit = trainer(tmp_path, max_epochs=2, callbacks=callbacks, prefetch_to_device=ahead)
        with contextlib.suppress(KeyboardInterrupt):
            fit.fit(module, loader, ckpt_path="last" if resume else None)
        return [*module.state_dict().values(), torch.get_rng_state()]

    whole = weights()
    weights(stop)
    for one, other in zip(weights(resume=stop), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stop", [None, 3])
def test_worker_processes_end_with_the_run(tmp_path, stop):
    """Not whenever the garbage is collected, which would wait for each in vain."""
    loader = DataLoader(dataset(), 8, num_workers=2)
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=6, callbacks=[Stops(stop)])
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            fit.fit(Regression(), loader)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_reading_ahead_changes_no_number(tmp_path):
    def weights(ahead):
        torch.manual_seed(2)
        module = Regression()
        trainer(tmp_path, max_epochs=2, prefetch_to_device=ahead).fit(module, *loaders())
        return module.state_dict().values()

    for one, other in zip(weights(True), weights(None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("stop", [3, 8])
def test_the_stateful_loader_of_torchdata_goes_on_where_it_stood(tmp_path, workers, kind, stop):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def weights(stop=None, resume=None):
        torch.manual_seed(2)
        if kind == "map":
            loader = stateful.StatefulDataLoader(dataset(40), 8, shuffle=True, num_workers=workers)
        else:
            loader = stateful.StatefulDataLoader(Counted(20), 4, num_workers=workers)
        module = Regression()
        fit = trainer(tmp_path, max_epochs=2, callbacks=[Stops(stop), keeps(tmp_path / str(stop or resume))])
        with contextlib.suppress(KeyboardInterrupt):
            fit.fit(module, loader, ckpt_path="last" if resume else None)
        return [*module.state_dict().values(), fit.global_step]

    whole = weights()
    weights(stop)
    resumed = weights(resume=stop)
    assert resumed.pop() == whole.pop()
    for one, other in zip(resumed, whole, strict=True):
        assert torch.equal(one, other)


class Counted(IterableDataset):
    """A stream that knows where it stands."""

    def __init__(self, count: int) -> None:
        self.count, self.at = count, 0

    def __iter__(self):
        x, y = dataset(self.count).tensors
        while self.at < self.count:
            self.at += 1
            yield x[self.at - 1], y[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_what_cannot_be_combined_is_refused(tmp_path):
    train, val = loaders()
    with pytest.raises(errors.ConfigError, match="mode.*shuffle.*min_size"):
        CombinedLoader([train], "shuffle")
    with pytest.raises(errors.ConfigError, match="sequential"):
        trainer(tmp_path, max_epochs=1).fit(Regression(), CombinedLoader([train, train], "sequential"))
    with pytest.raises(errors.ConfigError, match=r"min_size.*sequential"):
        trainer(tmp_path).predict(Regression(), CombinedLoader([val, val]))
    with pytest.raises(errors.ConfigError, match="limits"):
        CombinedLoader([train, val]).limits = [1]


@given(
    count=st.integers(0, 40),
    ranks=st.integers(1, 4),
    workers=st.integers(0, 3),
    uneven=st.sampled_from(["drop", "pad", "keep"]),
)
def test_a_sharded_stream_gives_each_sample_to_one_worker_of_one_rank(count, ranks, workers, uneven):
    shares = []
    for rank in range(ranks):
        dataset = ShardedIterable(range(count), uneven)
        dataset.for_rank(rank, ranks)
        for worker in range(max(workers, 1)):
            with as_worker(worker, workers):
                shares.append(list(dataset))
    lengths, seen = {len(share) for share in shares}, [n for share in shares for n in share]
    if uneven == "keep":
        assert sorted(seen) == list(range(count))
        return
    assert len(lengths) == 1
    assert len(set(seen)) == (len(seen) if uneven == "drop" else count)
    assert count - len(shares) < len(set(seen)) <= count


@contextlib.contextmanager
def as_worker(number, count):
    """What a worker process of a loader sees."""
    info = torch.utils.data._utils.worker
    info._worker_info = info.WorkerInfo(id=number, num_workers=count, seed=0, dataset=None) if count else None
    try:
        yield
    finally:
        info._worker_info = None


class Numbers(torch.utils.data.IterableDataset):
    """Splits itself over workers, or not; counts how often it is begun; says where it is asked to."""

    def __init__(self, by_worker=False, **says):
        self.by_worker, self.begun = by_worker, 0
        self.__dict__ |= says

    def __iter__(self):
        self.begun += 1
        worker = torch.utils.data.get_worker_info() if self.by_worker else None
        return iter(range(worker.id if worker else 0, 30, worker.num_workers if worker else 1))


def ranks_that_see(*others):
    """Two ranks, of which this one is the first, as the network would show them."""
    return SimpleNamespace(rank=0, world_size=2, gather_plain=lambda mine: [mine, *(others or [mine])])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("by_worker", [False, True])
def test_a_stream_is_looked_at_before_it_is_split(workers, by_worker):
    dataset = Numbers(by_worker)
    loader = DataLoader(dataset, 4, num_workers=workers)
    state = torch.get_rng_state()
    share = shard_of(loader, ranks_that_see(), training=True)
    assert (share.over_workers, share.uneven) == (not (workers and by_worker), "pad")
    assert torch.equal(state, torch.get_rng_state())
    assert dataset.begun == 0  # a copy was
    assert shard_of(loader, ranks_that_see("what the other one reads"), training=True) is None
    assert shard_of(loader, ranks_that_see(), training=False).uneven == "keep"


def test_a_stream_may_say_that_it_splits_itself_or_that_it_does_not():
    assert shard_of(DataLoader(Numbers(shards_itself=True), 4), ranks_that_see(), training=True) is None
    told = Numbers(shards_itself=False)
    share = shard_of(DataLoader(told, 4, drop_last=True), ranks_that_see("another one"), training=True)
    assert share.uneven == "drop"
    assert told.begun == 0


def test_a_share_of_a_sized_stream_has_its_length():
    class Sized(Numbers):
        def __len__(self):
            return 30

    for training, drops in ((True, False), (True, True), (False, False)):
        loader = DataLoader(Sized(), 4, drop_last=drops)
        shares = []
        for rank in range(4):
            ranks = SimpleNamespace(rank=rank, world_size=4, gather_plain=lambda mine: [mine])
            shares.append(shard_of(loader, ranks, training=training))
        assert [len(share) for share in shares] == [len(list(share)) for share in shares]


def test_a_stream_that_raises_is_named():
    class Broken(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield 1
            raise ValueError("no more")

    with pytest.raises(errors.UserCodeError, match="Broken raised ValueError at its first samples: no more"):
        shard_of(DataLoader(Broken(), 4), ranks_that_see(), training=True)


def test_real_workers_read_a_sharded_stream_once():
    found = [n for batch in DataLoader(ShardedIterable(range(23), "keep"), 4, num_workers=2) for n in batch.tolist()]
    assert sorted(found) == list(range(23))


def test_the_number_of_workers_is_measured():
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            time.sleep(0.004)
            return index

    count, rates = measured_num_workers(DataLoader(Slow(), 2), [0, 2], num_batches=20)
    assert set(rates) == {0, 2}
    assert rates[count] * 1.1 >= max(rates.values())
    assert 0 <= suggested_num_workers(1) <= 8
    with pytest.raises(errors.ConfigError, match="DataLoader"):
        measured_num_workers([1, 2])
