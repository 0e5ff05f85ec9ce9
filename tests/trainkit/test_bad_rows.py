"""The rows of the reliability contract for training and checkpoints, each by its id."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.trainkit.test_export import Branches, Net, needs_onnx
from tests.trainkit.tiny import Regression, dataset, loaders, trainer
from torch.utils.data import DataLoader

import trainkit
from common_platform import errors
from trainkit import checkpoint
from trainkit.callbacks import Callback, EarlyStopping, ModelCheckpoint
from trainkit.export import load_onnx, onnx_files
from trainkit.schedules import warmup_schedule
from trainkit.strategies import choose


def configured(make):
    class Model(Regression):
        def configure_optimizers(self):
            return make(self)

    return Model()


def stepping(step):
    class Model(Regression):
        training_step = step

    return Model()


def fit(root, module=None, train=None, **settings):
    settings.setdefault("max_epochs", 1)
    run = trainer(root, **settings)
    run.fit(module or Regression(), train if train is not None else loaders()[0])
    return run


def with_lr(root, lr):
    fit(root, configured(lambda m: torch.optim.SGD(m.parameters(), lr=lr)))


def warming(steps, total):
    return warmup_schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup_steps=steps, total_steps=total)


class BadRow(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 36:
            raise ValueError("bad row")
        return dataset(40)[index]


class Raises(Callback):
    """Raises in one hook."""

    def __init__(self, hook, error):
        self.error = error
        setattr(self, hook, self.fail)

    def fail(self, *_, **__):
        raise self.error


def two_keepers(root):
    trainer(root, callbacks=[ModelCheckpoint(root / "kept", save_last=True, every_n_epochs=n) for n in (1, 2)])


def one_gpu(root, monkeypatch):
    facts = SimpleNamespace(device_type="cuda", devices=(0,))
    monkeypatch.setattr(choose, "choose_device", lambda accelerator: torch.device("cuda", 0))
    monkeypatch.setattr(choose, "detect", lambda kind: facts)
    trainer(root, accelerator="gpu", devices=[9])


def no_deepspeed(root, monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    trainer(root, strategy="deepspeed")


def no_gpu(root):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    trainer(root, accelerator="gpu")


def overflowing(root):
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch).float() * 1e30

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fit(root, Overflows(), max_epochs=-1, precision="16-mixed", max_skipped=20)


def nan_at_seven(root):
    fit(root, stepping(lambda s, b, i: s.loss(b) * (math.nan if i == 7 else 1.0)))


C, T, U = errors.ConfigError, errors.TrainingError, errors.UserCodeError
ROWS = {  # id -> what is done, error, what its message names, exit status of the command line
    "trn-001": (lambda r: with_lr(r, torch.tensor(math.nan)), C, "lr.*nan", 3),
    "trn-002": (lambda r: with_lr(r, -1e-3), C, "lr.*-0.001", 3),
    "trn-003": (lambda r: with_lr(r, math.inf), C, "lr.*inf", 3),
    "trn-004": (lambda r: trainer(r, accumulate_grad_batches=0), C, "accumulate_grad_batches.*0.*>= 1", 3),
    "trn-005": (lambda r: trainer(r, accumulate_grad_batches=1.5), C, "accumulate_grad_batches.*number", 3),
    "trn-006": (lambda r: trainkit.DataModule.from_datasets(dataset(), batch_size=0), C, "batch_size.*0", 3),
    "trn-007": (lambda r: trainkit.DataModule.from_datasets(dataset(), batch_size=-4), C, "batch_size.*-4", 3),
    "trn-008": (lambda r: trainer(r, max_steps=-5), C, "max_steps.*-5", 3),
    "trn-009": (lambda r: warming(-1, 10), C, "warmup_steps.*-1", 3),
    "trn-010": (lambda r: warming(11, 10), C, "warmup_steps.*11.*10", 3),
    "trn-011": (lambda r: trainer(r, strategy="ddpp"), C, "ddpp.*single.*ddp", 3),
    "trn-013": (lambda r: trainer(r, precision="fp7"), C, "fp7.*bf16-mixed", 3),
    "trn-014": (lambda r: trainer(r, devices="all the gpus"), C, "devices", 3),
    "trn-015": (lambda r: trainer(r, devices=[0, 0]), C, "devices.*duplicate 0", 3),
    "trn-017": (lambda r: trainer(r, gradient_clip_val=-1), C, "gradient_clip_val", 3),
    "trn-018": (lambda r: fit(r, callbacks=[EarlyStopping("val_los")]), C, "val_los.*train_loss", 3),
    "trn-019": (lambda r: EarlyStopping("x", patience=-1), C, "patience.*-1", 3),
    "trn-020": (lambda r: ModelCheckpoint(every_n_train_steps=0), C, "every_n_train_steps.*0", 3),
    "trn-021": (two_keepers, C, "kept, twice", 3),
    "trn-022": (lambda r: trainer(r, max_epochs=1, val_check_interval=10**9).fit(Regression(), *loaders()), C,
                "1000000000.*8", 3),
    "trn-023": (lambda r: trainkit.seed_everything("abc"), C, "seed.*abc", 3),
    "trn-024": (no_gpu, errors.DeviceError, "gpu|cuda", 5),
    "trn-025": (lambda r: fit(r, configured(lambda m: torch.optim.SGD([], lr=1.0))), C, "optimizer.*0 parameters", 3),
    "trn-026": (lambda r: fit(r, configured(lambda m: torch.optim.SGD(m.freeze().parameters(), lr=1.0))), C,
                "no trainable parameters", 3),
    "trn-027": (lambda r: fit(r, configured(lambda m: "adam")), C, "configure_optimizers.*str", 3),
    "trn-028": (nan_at_seven, errors.NonFiniteLoss, "nan.*step 7.*rank 0", 7),
    "trn-029": (lambda r: fit(r, stepping(lambda s, b, i: s.loss(b).detach())), T, "loss with no grad", 7),
    "trn-030": (lambda r: fit(r, stepping(lambda s, b, i: s.net(b[0])[:, 0])), T, r"shape \[8\]", 7),
    "trn-031": (lambda r: fit(r, stepping(lambda s, b, i: None), max_skipped=5), T,
                "None for 5 batches.*max_skipped", 7),
    "trn-032": (lambda r: fit(r, train=DataLoader(BadRow(), 3)), U, "batch 12, rank 0.*bad row", 7),
    "trn-034": (lambda r: fit(r, train=DataLoader(dataset(3), 8, drop_last=True)), C, "train.*0 batches", 3),
    "trn-036": (lambda r: fit(r, callbacks=[Raises("on_train_batch_end", ValueError("x"))]), U,
                "Raises.on_train_batch_end raised ValueError at step 1", 7),
    "trn-037": (lambda r: fit(r, callbacks=[Raises("on_train_start", ValueError("first")),
                                            Ends(KeyError("second"))]), U, "ValueError.*first", 7),
    "trn-039": (overflowing, errors.NonFiniteLoss, "loss scale.*step", 7),
}  # fmt: skip


class Ends(Raises):
    def __init__(self, error):
        super().__init__("teardown", error)

    @property
    def state_key(self):
        return "ends"


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("row", ROWS)
def test_row(tmp_path, row):
    act, kind, says, status = ROWS[row]
    with pytest.raises(kind, match=f"(?s){says}") as raised:
        act(tmp_path)
    assert errors.exit_code(raised.value) == status
    if row == "trn-037":
        assert "second" in raised.value.__notes__[0]
    if kind is U:
        assert raised.value.__cause__ is not None
    last = checkpoint.find_last(tmp_path / "checkpoints")
    assert last is None or all(torch.isfinite(tensor).all() for tensor in checkpoint.load(last)[0].values())


@pytest.mark.parametrize(
    ("act", "kind", "says"),
    [
        pytest.param(no_deepspeed, errors.ResourceError, "pip install deepspeed", id="trn-012"),
        pytest.param(one_gpu, errors.DeviceError, "9.*1", id="trn-016"),
    ],
)
def test_row_of_an_environment(tmp_path, monkeypatch, act, kind, says):
    with pytest.raises(kind, match=says) as raised:
        act(tmp_path, monkeypatch)
    assert errors.exit_code(raised.value) == 5


@pytest.mark.parametrize("row", [pytest.param(None, id="trn-038")])
def test_row_of_an_interrupt(tmp_path, row):
    keep = ModelCheckpoint(save_on_exception=True)
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(tmp_path, callbacks=[Raises("on_train_batch_end", KeyboardInterrupt()), keep])
    assert errors.exit_code(raised.value) == 130
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


class Generates(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(part for part in (self.layers(x) for _ in range(2)))


def off_by_one(root, monkeypatch):
    module = Net()
    onnx = pytest.importorskip("onnx") and __import__("trainkit.export.onnx", fromlist=["_run"])
    run = onnx._run
    monkeypatch.setattr(onnx, "_run", lambda *a: [tensor + 1 for tensor in run(*a)])
    module.to_onnx(root / "net.onnx")


@needs_onnx
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("act", "says"),
    [
        pytest.param(lambda r, m: Branches().to_onnx(r / "net.onnx"), "Branches", id="trn-040"),
        pytest.param(lambda r, m: Generates().to_torchscript(r / "net.pt"), "Generates|[Gg]enerator", id="trn-041"),
        pytest.param(off_by_one, "differ by", id="trn-042"),
    ],
)
def test_row_of_an_export(tmp_path, monkeypatch, act, says):
    with pytest.raises(errors.ExportError, match=says) as raised:
        act(tmp_path, monkeypatch)
    assert errors.exit_code(raised.value) == 7
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("row", [pytest.param(None, id="trn-043")])
def test_row_of_a_model_with_its_weights_beside_it(tmp_path, monkeypatch, row):
    """As above 2 GiB; here the limit is lower."""
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr("trainkit.export.onnx.ONE_FILE_BYTES", 100)
    Large().to_onnx(tmp_path / "net.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data", "net.onnx.json"]
    model = onnx.load_model(tmp_path / "net.onnx", load_external_data=False)
    assert set(onnx_files._locations(model)) == {"net.onnx.data"}
    listed = json.loads((tmp_path / "net.onnx.json").read_text())["files"]
    for file in listed:
        assert hashlib.sha256((tmp_path / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    assert [file["name"] for file in listed] == ["net.onnx", "net.onnx.data"]
    load_onnx(tmp_path / "net.onnx")
    changed(tmp_path / "net.onnx.data", lambda content: content[:-1] + b"?")
    with pytest.raises(errors.ArtifactDigestMismatch, match=r"net\.onnx\.data"):
        load_onnx(tmp_path / "net.onnx")


class Large(Net):
    """The exporter keeps small tensors in the model."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1000), torch.nn.Linear(1000, 4))


@needs_onnx
@pytest.mark.parametrize("row", [pytest.param(None, id="trn-044")])
@pytest.mark.parametrize("location", ["a/../../x", "../x", "/etc/hostname", "a/x", "", "linked"])
@pytest.mark.parametrize("place", ["initializer", "attribute", "function"])
def test_row_of_weights_that_lie_elsewhere(tmp_path, row, location, place):
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for path in (tmp_path / "x", folder / "a" / "x"):
        path.write_bytes(bytes(16))
    (folder / "linked").symlink_to(tmp_path / "x")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    inner = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    nodes, functions, tensors = [], [], []
    match place:
        case "initializer":
            tensors = [tensor]
        case "attribute":
            graph = onnx.helper.make_graph([inner], "inner", [], [])
            nodes = [onnx.helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)]
        case "function":
            functions = [onnx.helper.make_function("own", "F", [], ["w"], [inner], [onnx.helper.make_opsetid("", 18)])]
    graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
    (folder / "m.onnx").write_bytes(onnx.helper.make_model(graph, functions=functions).SerializeToString())
    with pytest.raises(errors.ArtifactRefused, match="external_data.location") as raised:
        load_onnx(folder / "m.onnx")
    assert location in str(raised.value)
    assert errors.exit_code(raised.value) == 4


# --- checkpoints ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one epoch and a half, with a checkpoint in the middle of the second epoch."""
    root = tmp_path_factory.mktemp("made")
    keep = ModelCheckpoint(root, every_n_train_steps=12, filename="kept", auto_insert_metric_name=False)
    trainer(root, max_epochs=2, logger=False, callbacks=[keep]).fit(Regression(), *loaders())
    return root / "kept.ckpt"


@pytest.fixture
def saved(made, tmp_path):
    subprocess.run(["cp", "-a", str(made), str(tmp_path / "kept")], check=True)
    return tmp_path / "kept"


def changed(path, change):
    path.write_bytes(change(path.read_bytes()))


def flipped(name):
    return lambda folder: changed(folder / name, lambda content: bytes([content[0] ^ 1]) + content[1:])


def versioned(number):
    def act(folder):
        about = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(about | {"format_version": number}))

    return act


def rng_pickle(folder):
    with (folder / "rng_state.pkl").open("wb") as file:
        pickle.dump({"python": 1}, file)


def distributed(folder):
    (folder / "manifest.json").unlink()
    with (folder / ".metadata").open("wb") as file:
        pickle.dump({"state_dict_metadata": {}}, file)


CORRUPT, VERSION = errors.CheckpointCorrupt, errors.CheckpointVersionError
DAMAGE = {  # id -> what is done to the folder, error, what its message names
    "ckp-002": (lambda f: changed(f / "model.safetensors", lambda c: c[: len(c) // 2]), CORRUPT,
                "model.safetensors"),
    "ckp-003": (flipped("model.safetensors"), CORRUPT, "model.safetensors"),
    "ckp-004": (flipped("state.safetensors"), CORRUPT, "state.safetensors"),
    "ckp-005": (flipped("manifest.json"), CORRUPT, "manifest"),
    "ckp-006": (lambda f: (f / "manifest.json").unlink(), errors.CheckpointIncomplete, "manifest"),
    "ckp-007": (versioned(99), VERSION, "99.*1"),
    "ckp-008": (versioned(0), VERSION, "0.*1"),
    "ckp-018": (rng_pickle, errors.ArtifactRefused, "rng_state"),
    "ckp-025": (distributed, errors.ArtifactRefused, ".metadata"),
}  # fmt: skip


@pytest.mark.parametrize("row", DAMAGE)
def test_row_of_a_damaged_checkpoint(saved, tmp_path, row):
    act, kind, says = DAMAGE[row]
    act(saved)
    with pytest.raises(kind, match=says) as raised:
        trainer(tmp_path, max_epochs=3).fit(Regression(), *loaders(), ckpt_path=saved)
    assert errors.exit_code(raised.value) == 4


def another_shape(folder, root):
    trainer(root, max_epochs=3).fit(Regression(width=9), *loaders(), ckpt_path=folder)


def another_name(folder, root):
    class More(Regression):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(1, 1)

    trainer(root, max_epochs=3).fit(More(), *loaders(), ckpt_path=folder)


def another_length(folder, root):
    trainer(root, max_epochs=3).fit(Regression(), *loaders(batch_size=4), ckpt_path=folder)


def another_scheduler(folder, root):
    def make(m):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer(root, max_epochs=3).fit(configured(make), *loaders(), ckpt_path=folder)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        pytest.param(another_shape, r"net.*\[8.*\[9", id="ckp-019"),
        pytest.param(another_name, "2 tensors.*extra.bias, extra.weight", id="ckp-020"),
        pytest.param(another_length, "train_dataloaders.*16 batches.*8", id="ckp-021"),
        pytest.param(another_scheduler, "ExponentialLR.*StepLR", id="ckp-022"),
    ],
)
def test_row_of_a_checkpoint_of_another_run(made, tmp_path, act, says):
    with pytest.raises(errors.CheckpointError, match=says) as raised:
        act(made, tmp_path)
    assert errors.exit_code(raised.value) == 4


class Holds(Callback):
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"inner": [self.value]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        pytest.param(lambda: lambda: 0, "Holds.inner.0: got function", id="ckp-015"),
        pytest.param(lambda: SimpleNamespace(), "Holds.inner.0: got SimpleNamespace", id="ckp-016"),
    ],
)
def test_row_of_a_state_that_cannot_be_written(tmp_path, value, says):
    with pytest.raises(errors.CheckpointError, match=says):
        fit(tmp_path, callbacks=[Holds(value())])


class Boom:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("row", [pytest.param(None, id="ckp-017")])
def test_row_of_a_pickle(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": Boom()}, tmp_path / "evil.ckpt")
    with pytest.raises(errors.ArtifactRefused, match="evil.ckpt.*pickle"):
        trainer(tmp_path).fit(Regression(), *loaders(), ckpt_path=tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("row", [pytest.param(None, id="ckp-014")])
def test_row_of_a_folder_that_is_read_only(tmp_path, row):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("a file system can be mounted by the administrator only")
    try:
        keep = ModelCheckpoint(disk / "kept")
        with pytest.raises(errors.CheckpointWriteError, match="Read-only.*dirpath"):
            fit(tmp_path, callbacks=[keep])
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def linked(root, target):
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "last.ckpt").symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize("row", [pytest.param(None, id="ckp-023")])
def test_row_of_a_link_to_nothing(tmp_path, row):
    linked(tmp_path, "gone.ckpt")
    with pytest.raises(errors.CheckpointIncomplete, match=r"last\.ckpt"):
        trainer(tmp_path).fit(Regression(), *loaders(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(errors.CheckpointIncomplete, match=r"last\.ckpt.*gone\.ckpt"):
        trainer(tmp_path).fit(Regression(), *loaders(), ckpt_path="last")


@pytest.mark.parametrize("row", [pytest.param(None, id="ckp-024")])
def test_row_of_a_link_that_leads_out(saved, tmp_path, row):
    linked(tmp_path, "../kept")
    with pytest.raises(errors.CheckpointError, match=r"last\.ckpt.*\.\./kept"):
        trainer(tmp_path).fit(Regression(), *loaders(), ckpt_path="last")


@pytest.mark.parametrize("row", [pytest.param(None, id="ckp-026")])
def test_row_of_what_a_killed_save_left(made, tmp_path, row):
    folder = tmp_path / "checkpoints"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = folder / f".epoch=0-step=8.ckpt.writing-{gone.pid}-0123abcd"
    left.mkdir(parents=True)
    (left / "manifest.json").write_text("{}")
    assert checkpoint.find_last(folder) is None
    assert checkpoint.newest_first(folder) == []
    run = fit(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["epoch=0-step=8.ckpt"]
    assert list(run.checkpoint_callback.best_k_models) == [str(folder / "epoch=0-step=8.ckpt")]


@pytest.mark.parametrize("row", [pytest.param(None, id="ckp-009")])
def test_row_of_another_number_of_ranks(made, tmp_path, row):
    weights, state = checkpoint.load(made)
    checkpoint.save(tmp_path / "four", weights, state | {"ranks": state["ranks"] * 4})
    with pytest.raises(errors.CheckpointWorldSizeError, match=r"4 ranks.*not 1") as raised:
        trainer(tmp_path, max_epochs=3).fit(Regression(), *loaders(), ckpt_path=tmp_path / "four")
    assert errors.exit_code(raised.value) == 4


def of_four_ranks(made, folder):
    weights, state = checkpoint.load(made)
    checkpoint.save(folder, weights, state | {"ranks": state["ranks"] * 4})


def without_rank_three(made, folder):
    of_four_ranks(made, folder)
    (folder / "rank-00003.safetensors").unlink()


def mixed(made, folder):
    of_four_ranks(made, folder)
    weights, state = checkpoint.load(folder)
    checkpoint.save(folder.parent / "later", weights, state | {"global_step": 99})
    shutil.copy(folder.parent / "later" / "rank-00001.safetensors", folder)


def of_fsdp(made, folder):
    weights, state = checkpoint.load(made)
    checkpoint.save(folder, weights, state | {"strategy": {"name": "fsdp", "layout": "sharded"}})


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        pytest.param(without_rank_three, errors.CheckpointIncomplete, "rank 3.*no rank-00003", id="ckp-010"),
        pytest.param(mixed, errors.CheckpointCorrupt, "rank-00001.*step 99.*step 12", id="ckp-011"),
        pytest.param(of_fsdp, errors.CheckpointError, "saved by fsdp, sharded.*single", id="ckp-012"),
    ],
)
def test_row_of_a_checkpoint_of_several_ranks(made, tmp_path, make, kind, says):
    """That no rank hangs: test_ddp.py."""
    make(made, tmp_path / "kept")
    with pytest.raises(kind, match=says) as raised:
        trainer(tmp_path, max_epochs=3).fit(Regression(), *loaders(), ckpt_path=tmp_path / "kept")
    assert errors.exit_code(raised.value) == 4


ELSEWHERE = {
    "trn-033": "test_bad_inputs.py", "trn-035": "test_ddp.py",
    "ckp-001": "test_kills.py", "ckp-013": "test_async_save.py",
}  # fmt: skip


def test_every_row_has_its_test():
    here = set(re.findall(r"(?:trn|ckp)-\d{3}", Path(__file__).read_text()))
    wanted = {f"trn-{n:03}" for n in range(1, 45)} | {f"ckp-{n:03}" for n in range(1, 27)}
    assert here == wanted
    for name in ELSEWHERE.values():
        assert (Path(__file__).parent / name).is_file()
