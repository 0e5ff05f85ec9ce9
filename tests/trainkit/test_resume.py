"""A resumed run is the run: bit for bit, after a real kill, and never from a damaged checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainkit.tiny import Regression, child_environment, loaders, trainer

from common_platform import errors
from trainkit import checkpoint
from trainkit.callbacks import Callback, EarlyStopping, ModelCheckpoint
from trainkit.checkpoint.tree import join, split

STEPS = 18  # two epochs and a quarter, at 8 batches an epoch
SETTINGS = {"max_epochs": 3, "limit_val_batches": 2, "val_check_interval": 4, "gradient_clip_val": 0.5}


def fit(root: Path, stop_after: int | None = None, *, resume: bool = False, accumulate: int = 1) -> Regression:
    """A run with everything that has a state; it dies in the middle of step ``stop_after``, if there is one."""

    class Dies(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if stop_after is not None and trainer.global_step >= stop_after:
                raise KeyboardInterrupt

    torch.manual_seed(3)
    module = Regression()
    keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=1)
    callbacks = [EarlyStopping("val_loss", patience=20, restore_best=True), Dies(), keep]
    run = trainer(root, callbacks=callbacks, accumulate_grad_batches=accumulate, **SETTINGS)
    run.loggers[0]._folder = root / "logs" / "only"
    train, val = loaders()
    try:
        run.fit(module, train, val, ckpt_path="last" if resume else None)
    except KeyboardInterrupt:
        assert stop_after is not None
    return module


def log_of(root: Path) -> str:
    return (root / "logs" / "only" / "metrics.csv").read_text()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 7, 8])
def test_resume_is_bit_equal(tmp_path, stop_after, accumulate):
    whole = fit(tmp_path / "whole", accumulate=accumulate)
    fit(tmp_path / "parts", stop_after, accumulate=accumulate)
    resumed = fit(tmp_path / "parts", resume=True, accumulate=accumulate)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


CHILD = """
import sys, time
from pathlib import Path
from tests.trainkit import test_resume
from trainkit.callbacks import Callback

class Slow(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print(trainer.global_step, flush=True)
        if trainer.global_step == KILL_AT + 2:
            time.sleep(100)  # until it is killed, however late that is

KILL_AT = int(sys.argv[2])
test_resume.EarlyStopping = lambda *a, **k: Slow()
test_resume.fit(Path(sys.argv[1]), resume=len(sys.argv) > 3)
"""


def run_child(root: Path, *more: str, kill_at: int = -9) -> int:
    command = [sys.executable, "-c", CHILD, str(root), str(kill_at), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    try:
        for line in process.stdout:
            if int(line) == kill_at:
                time.sleep(0.02)  # somewhere in the saves or the steps that follow
                process.send_signal(signal.SIGKILL)
                break
        return process.wait(60)
    finally:
        process.kill()
        process.stdout.close()


def test_kill_dash_nine_in_the_middle_of_an_epoch(tmp_path):
    assert run_child(tmp_path / "whole") == 0
    assert run_child(tmp_path / "killed", kill_at=11) == -signal.SIGKILL
    assert run_child(tmp_path / "killed", "resume", kill_at=15) == -signal.SIGKILL
    assert run_child(tmp_path / "killed", "resume") == 0
    one = checkpoint.load(checkpoint.find_last(tmp_path / "whole" / "checkpoints"))
    other = checkpoint.load(checkpoint.find_last(tmp_path / "killed" / "checkpoints"))
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    fit(root, 3)
    return checkpoint.find_last(root / "checkpoints")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_found_and_named(saved, data):
    name = data.draw(st.sampled_from(["model.safetensors", "state.safetensors", "state.json"]))
    path = saved / name
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(content[:at] if cut else content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    try:
        with pytest.raises(errors.CheckpointCorrupt, match=name):
            checkpoint.load(saved)
    finally:
        path.write_bytes(content)


def test_a_missing_file_is_found(saved):
    (saved / "state.json").rename(saved.parent / "aside")
    try:
        with pytest.raises(errors.CheckpointCorrupt, match=r"state\.json"):
            checkpoint.load(saved)
    finally:
        (saved.parent / "aside").rename(saved / "state.json")


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(errors.CheckpointIncomplete):
        trainer(tmp_path).fit(Regression(), loaders()[0], ckpt_path=tmp_path / "nowhere")
    assert checkpoint.find_last(tmp_path / "nowhere") is None


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(torch.arange(3.0))
)
keys = st.one_of(st.text(max_size=4), st.integers(-5, 5))


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3), st.tuples(inner, inner)
        ),
        max_leaves=8,
    )
)
def test_any_state_comes_back_as_it_was(value):
    tensors: dict[str, torch.Tensor] = {}
    plain = split(value, tensors)
    assert _same(join(plain, tensors), value)


def _same(one, other):
    if isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(other, float):
        return one == other or (one != one and other != other)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in other)
    if isinstance(other, list | tuple):
        return type(one) is type(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other and type(one) is type(other)


def test_objects_are_refused_by_place():
    with pytest.raises(errors.CheckpointError, match=r"state\.a\.0.*object"):
        split({"a": [object()]}, {})


INTERRUPTED = """
import sys, time
from pathlib import Path
from tests.trainkit.tiny import Regression, loaders, trainer
from trainkit.callbacks import Callback, ModelCheckpoint

class Slow(Callback):
    def on_train_batch_end(self, *args):
        print("step", flush=True)
        time.sleep(0.2)
    def on_exception(self, trainer, module, exception):
        print(type(exception).__name__, flush=True)

train, val = loaders()
trainer(Path(sys.argv[1]), max_epochs=100, callbacks=[Slow(), ModelCheckpoint(save_on_exception=True)]).fit(
    Regression(), train, val)
"""


def test_control_c_ends_cleanly_and_saves_when_asked(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=child_environment()
    )
    try:
        assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert rest.split()[-1] == "KeyboardInterrupt"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert checkpoint.load(tmp_path / "checkpoints" / "last.ckpt")[1]["global_step"] >= 1
