"""An artifact is whole or absent, and nothing damaged gets through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common_platform import errors
from common_platform.artifact import ArtifactWriter, Probe, check_probes, open_model_folder, verify

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}


def write(path: Path, **more) -> Path:
    with ArtifactWriter(path, **more) as writer:
        writer.write_json("config.json", {"architectures": ["X"], "hidden_size": 4})
        writer.write_json("tokenizer.json", {"model": {}})
        writer.write_tensors("model.safetensors", TENSORS)
        writer.commit(provenance={"step": 3}, probes=[Probe([1, 2, 3], [-0.5, -1.5])])
    return path


def everything(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_round_trip(tmp_path):
    folder = open_model_folder(write(tmp_path / "m"))
    assert folder.config["hidden_size"] == 4
    assert folder.manifest.provenance == {"step": 3}
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.tensor(name), tensor)
        assert folder.dtype(name) == tensor.dtype
        assert folder.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_damage_is_found_and_named(tmp_path_factory, count):
    @settings(max_examples=count, deadline=None, database=None)
    @given(data=st.data())
    def damaged(data):
        path = write(tmp_path_factory.mktemp("a") / "m")
        open_model_folder(path)  # what is whole is taken
        _is_refused_once_damaged(path, tmp_path_factory, data)

    damaged()


def _is_refused_once_damaged(path, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(everything(path))))
    content = (path / name).read_bytes()
    damage = data.draw(st.sampled_from(["flip", "cut", "grow", "missing", "symlink", "hardlink", "swap"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if damage == "flip":
        bit = data.draw(st.integers(0, 7))
        (path / name).write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
    elif damage == "cut":
        (path / name).write_bytes(content[:at])
    elif damage == "grow":
        (path / name).write_bytes(content + b"x")
    else:
        moved = tmp_path_factory.mktemp("b") / "elsewhere"
        (path / name).rename(moved)
        if damage == "symlink":
            (path / name).symlink_to(moved)
        elif damage == "hardlink":
            os.link(moved, path / name)
        elif damage == "swap":
            (path / name).mkdir()
    if name == "manifest.json" and damage in ("flip", "grow", "cut") and _same_meaning(path, content):
        return
    with pytest.raises(errors.ArtifactError) as raised:
        open_model_folder(path)
    if name != "manifest.json":
        assert name in str(raised.value)


def _same_meaning(path: Path, content: bytes) -> bool:
    """A flip inside the provenance changes words, not files; white space changes nothing."""
    try:
        now, was = json.loads((path / "manifest.json").read_text()), json.loads(content)
    except ValueError:
        return False
    return all(now.get(key) == was[key] for key in ("files", "format_version"))


@pytest.mark.parametrize("name", ["extra.txt", "sub/extra.json", "model-2.safetensors"])
def test_a_file_too_many_is_refused(tmp_path, name):
    path = write(tmp_path / "m")
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("x")
    with pytest.raises(errors.ArtifactRefused, match=name.split("/")[-1]):
        verify(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", ".hidden", "a\\b", "a\0b", "", "a//b"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    path = write(tmp_path / "m")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(errors.ArtifactRefused):
        open_model_folder(path)


def test_a_newer_format_says_so(tmp_path):
    path = write(tmp_path / "m")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(errors.ArtifactVersionError, match="update"):
        open_model_folder(path)


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({}, errors.ArtifactMissing, "config.json"),
        ({"config.json": "{}"}, errors.ArtifactMissing, "model.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, errors.ArtifactRefused, "pytorch_model.bin"),
        ({"config.json": '{"a": 1, "a": 2}', "model.safetensors": "x"}, errors.ArtifactFormatError, "twice"),
        ({"config.json": '{"a": NaN}', "model.safetensors": "x"}, errors.ArtifactFormatError, "NaN"),
        ({"config.json": '{"auto_map": {"AutoModel": "x.Y"}}'}, errors.ArtifactRefused, "auto_map"),
        ({"config.json": '{"text_config": {"auto_map": {"A": "x"}}}'}, errors.ArtifactRefused, "auto_map"),
        ({"config.json": "{}", "model.safetensors": "xxxxxxxxxxxx"}, errors.ArtifactFormatError, "model.safetensors"),
    ],
)
def test_a_wrong_folder_says_what_is_wrong(tmp_path, files, error, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=says):
        open_model_folder(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(errors.ArtifactMissing, match="folder"):
        open_model_folder(tmp_path / "nowhere")


def header(path: Path, about: dict, data: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    text = json.dumps(about).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "about",
    [
        {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},  # overlap
        {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},  # hole
        {"a": entry(0, 400, [100])},  # beyond the end
        {"a": entry(0, 12, [4])},  # shape and bytes disagree
        {"a": entry(-4, 8, [3])},
        {"a": entry(0, 12, [-3])},
        {"a": entry(0, 12, [3], "F99")},
        {"a": entry(0, 12, [2**62, 2**62])},
        {"a": entry(0, 12, [True, 3])},
        {"a": {"dtype": "F32", "shape": [3]}},
        {"a": 5},
    ],
)
def test_unsound_safetensors_headers_are_refused(tmp_path, about):
    with pytest.raises(errors.ArtifactFormatError, match=r"model\.safetensors"):
        open_model_folder(header(tmp_path / "m", about, b"\0" * 12))


def test_leaving_without_commit_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "m") as writer:
        writer.write_json("config.json", {})
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_only_replaced_when_asked(tmp_path):
    path = write(tmp_path / "m")
    before = everything(path)
    with pytest.raises(errors.ConfigError, match="overwrite"):
        write(path)
    assert everything(path) == before
    write(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


KILLED = """
import sys, time
from common_platform.artifact import ArtifactWriter
with ArtifactWriter(sys.argv[1]) as writer:
    writer.write_bytes("big", b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_no_artifact_and_its_debris_goes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert not (tmp_path / "m").exists()
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


FULL = """
import resource, signal, sys, torch
from common_platform.artifact import ArtifactWriter
from common_platform.errors import ArtifactError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with ArtifactWriter(sys.argv[1], overwrite=True) as writer:
        writer.write_bytes("config.json", b"{}")
        writer.write_bytes("big", b"x" * 100000)
        writer.commit()
except ArtifactError as error:
    print(error.code, type(error.__cause__).__name__)
"""


def test_a_full_disk_is_an_error_and_what_stood_there_is_whole(tmp_path):
    path = write(tmp_path / "m")
    before = everything(path)
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["artifact_write", "OSError"], done.stderr
    assert everything(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_probes_name_the_position_that_differs():
    probes = [Probe([1, 2], [-1.0]), Probe([1, 2, 3], [-1.0, -2.0])]
    right = {(1, 2): [-1.0], (1, 2, 3): [-1.0, -2.0005]}
    assert check_probes(probes, lambda ids: right[tuple(ids)], tolerance=1e-3) == pytest.approx(5e-4)
    with pytest.raises(errors.ArtifactDigestMismatch, match=r"probes\[1\]\.logprobs\[1\]"):
        check_probes(probes, lambda ids: right[tuple(ids)], tolerance=1e-4)
    with pytest.raises(errors.ArtifactDigestMismatch):
        check_probes(probes[:1], lambda ids: [float("nan")], tolerance=1.0)


def test_a_tensor_outlives_its_folder(tmp_path):
    path = tmp_path / "m"
    with ArtifactWriter(path) as writer:
        writer.write_json("config.json", {})
        writer.write_tensors("model.safetensors", {"w": torch.zeros(4_000_000)})
        writer.commit()
    folder = open_model_folder(path)
    tensor = folder.tensor("w")
    folder.close()
    assert tensor.sum() == 0
