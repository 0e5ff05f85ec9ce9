"""The rows of the bad inputs that are an artifact or a model folder: each is refused by name, before a weight is used.

A row's number stands in its test's id. ``servekit verify`` refuses each with exit 4 as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from common_platform import errors
from common_platform.artifact import ArtifactWriter, Probe, open_model_folder
from servekit import LLM, SamplingParams
from servekit.cli import _run
from servekit.engine.tokenizer import Tokenizer
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import InProcessExecutor

VOCABULARY, HIDDEN = 32, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}
WEIGHTS = "model.safetensors"
MODEL = "model-dir"  # a folder without a manifest


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    at, kv = "model.layers.0", HIDDEN // 2
    shapes = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        f"{at}.input_layernorm": (HIDDEN,),
        f"{at}.post_attention_layernorm": (HIDDEN,),
        f"{at}.self_attn.q_proj": (HIDDEN, HIDDEN),
        f"{at}.self_attn.k_proj": (kv, HIDDEN),
        f"{at}.self_attn.v_proj": (kv, HIDDEN),
        f"{at}.self_attn.o_proj": (HIDDEN, HIDDEN),
        f"{at}.mlp.gate_proj": (32, HIDDEN),
        f"{at}.mlp.up_proj": (32, HIDDEN),
        f"{at}.mlp.down_proj": (HIDDEN, 32),
    }
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def tokenizer() -> RustTokenizer:
    made = RustTokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A plain model folder, and an artifact of the same model."""
    root = tmp_path_factory.mktemp("rows")
    plain = root / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(CONFIG))
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    tokenizer().save(str(plain / "tokenizer.json"))
    save_file(tensors(), plain / WEIGHTS)
    executor = InProcessExecutor(plain, ExecutorConfig())
    ids = [3, 4, 5, 6]
    logprobs = executor.score(ids)
    executor.stop()
    with ArtifactWriter(root / "artifact") as writer:
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            writer.write_bytes(file, (plain / file).read_bytes())
        writer.write_tensors(WEIGHTS, tensors())
        writer.commit(probes=[Probe(ids, logprobs)])
    return {MODEL: plain, "artifact": root / "artifact"}


# --- what can be done to a folder ---


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def write_manifest(path: Path, about: dict[str, Any]) -> None:
    (path / "manifest.json").write_text(json.dumps(about))


def in_manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda path: write_manifest(path, manifest_of(path) | changes)


def in_entry(**changes: Any) -> Callable[[Path], None]:
    """Change what the manifest says of the weights."""

    def damage(path: Path) -> None:
        about = manifest_of(path)
        for entry in about["files"]:
            if entry["name"] == WEIGHTS:
                entry |= {key: value(entry[key]) if callable(value) else value for key, value in changes.items()}
        write_manifest(path, about)

    return damage


def attested(path: Path, *names: str) -> None:
    """Make the manifest fit the files as they are now."""
    about = manifest_of(path)
    entries = {entry["name"]: entry for entry in about["files"]}
    for name in names:
        data = (path / name).read_bytes()
        entries[name] = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(path, about | {"files": list(entries.values())})


def with_file(name: str, data: bytes, *, is_listed: bool = False) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes(data)
        if is_listed:
            attested(path, name)

    return damage


def with_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other tensors, and a manifest that fits them."""

    def damage(path: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()}
        change(found)
        is_artifact = (path / "manifest.json").exists()
        save_file(found, path / WEIGHTS, metadata={"belongs_to": "manifest.json"} if is_artifact else {})
        if is_artifact:
            attested(path, WEIGHTS)

    return damage


def with_header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other bytes of the weights, and a manifest that fits them."""

    def damage(path: Path) -> None:
        (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))
        attested(path, WEIGHTS)

    return damage


def with_entry(**changes: Any) -> Callable[[bytes], bytes]:
    """Change what the header says of the first tensor."""

    def change(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header[sorted(set(header) - {"__metadata__"})[0]] |= changes
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return change


def with_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        old = json.loads((path / name).read_text()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps(old | changes))

    return damage


def both(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        for step in steps:
            step(path)

    return damage


def linked_away(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        outside = path.parent / f"outside-{name}"
        (path / name).rename(outside)
        (path / name).symlink_to(outside)

    return damage


def folder_linked_away(path: Path) -> None:
    outside = path.parent / "outside"
    outside.mkdir()
    (path / "more").symlink_to(outside)


def twice_a_key(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace("{", '{"model": {},', 1))


def as_one_file(suffix: str) -> Callable[[Path], None]:
    """The artifact packed: nothing is unpacked here, whatever its members are called or grow to."""

    def damage(path: Path) -> None:
        shutil.rmtree(path)
        path.write_bytes(b"PK\x03\x04" + suffix.encode() + b"../../x")

    return damage


def other_tokenizer(path: Path) -> None:
    data = (path / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(data.replace(b'"w7"', b'"x7"'))


def sharded(**changes: Any) -> Callable[[Path], None]:
    """Two shards and an index; ``changes`` go into its map."""

    def damage(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        names = sorted(found)
        save_file({name: found[name] for name in names[:5]}, path / "a.safetensors")
        save_file({name: found[name] for name in names[5:]}, path / "b.safetensors")
        where = {name: "a.safetensors" if i < 5 else "b.safetensors" for i, name in enumerate(names)}
        (path / WEIGHTS).unlink()
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where | changes}))

    return damage


def in_two_shards(path: Path) -> None:
    found = load_file(path / "a.safetensors")
    save_file(load_file(path / "b.safetensors") | {"model.norm.weight": torch.ones(HIDDEN)}, path / "b.safetensors")
    save_file(found | {"model.norm.weight": torch.ones(HIDDEN)}, path / "a.safetensors")


def slow_normalizer(path: Path) -> None:
    about = tokenizer()
    text = json.loads(about.to_str())
    text["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    (path / "tokenizer.json").write_text(json.dumps(text))


def only_pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


MISSING, DIGEST, FORM, REFUSED, SHAPE, VALUE, VERSION = (
    errors.ArtifactMissing,
    errors.ArtifactDigestMismatch,
    errors.ArtifactFormatError,
    errors.ArtifactRefused,
    errors.ArtifactShapeError,
    errors.ArtifactConfigError,
    errors.ArtifactVersionError,
)
DEEP = ("[" * 10_000 + "]" * 10_000).encode()
ROWS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "art-001": (lambda path: (path / "manifest.json").unlink(), MISSING, r"manifest\.json"),
    "art-002": (lambda path: (path / "tokenizer.json").unlink(), MISSING, r"tokenizer\.json"),
    "art-003": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1] + b"\xff"),
        DIGEST,
        r"model\.safetensors.*[0-9a-f]{8}.*[0-9a-f]{8}",
    ),
    "art-004-upper": (in_entry(sha256=str.upper), FORM, "sha256"),
    "art-004-short": (in_entry(sha256=lambda digest: digest[:63]), FORM, "sha256"),
    "art-004-prefix": (in_entry(sha256=lambda digest: f"sha256:{digest}"), FORM, "sha256"),
    "art-005": (in_entry(size=lambda size: size + 1), FORM, "size"),
    "art-006": (with_file("model.pkl", b"x"), REFUSED, r"model\.pkl"),
    "art-007": (with_file("evil.py", b"x"), REFUSED, r"evil\.py"),
    "art-008-bin": (with_file("pytorch_model.bin", b"x", is_listed=True), REFUSED, r"type \.bin"),
    "art-008-pt": (with_file("model.pt", b"x", is_listed=True), REFUSED, r"type \.pt"),
    "art-008-pkl": (with_file("model.PKL", b"x", is_listed=True), REFUSED, r"type \.PKL"),
    "art-009": (linked_away(WEIGHTS), REFUSED, r"model\.safetensors.*symlink"),
    "art-010": (folder_linked_away, REFUSED, "more.*symlink"),
    "art-011": (in_entry(name="../x.safetensors"), REFUSED, r"\.\./x\.safetensors"),
    "art-012": (in_entry(name="/etc/passwd"), REFUSED, "/etc/passwd"),
    "art-013-nul": (in_entry(name="a\0b"), REFUSED, r"a\\x00b"),
    "art-013-newline": (in_entry(name="a\nb"), REFUSED, r"a\\nb"),
    "art-013-backslash": (in_entry(name="a\\b"), REFUSED, "a.b"),
    "art-014": (as_one_file(".tar"), REFUSED, "archives"),
    "art-015": (as_one_file(".tar"), REFUSED, "archives"),
    "art-016": (as_one_file(".zip"), REFUSED, "archives"),
    "art-017": (with_header(lambda data: struct.pack("<Q", 2**60) + data[8:]), FORM, "header length"),
    "art-018": (with_header(lambda data: struct.pack("<Q", len(data)) + data[8:]), FORM, "header length"),
    "art-019": (with_header(lambda data: data[:7]), FORM, "7 bytes"),
    "art-020": (with_header(lambda data: struct.pack("<Q", 8) + b"not JSON" + data[16:]), FORM, "header"),
    "art-021": (with_header(lambda data: data[:-1]), FORM, r"weight"),
    "art-022": (with_header(with_entry(data_offsets=[64, 0])), FORM, r"\.weight"),
    "art-023": (with_header(with_entry(shape=[2, 2], data_offsets=[0, 8])), FORM, r"\.weight"),
    "art-024": (
        with_weights(lambda found: found["model.norm.weight"].__setitem__(3, float("nan"))),
        REFUSED,
        r"model\.norm\.weight: got 1 values.*--allow-nonfinite",
    ),
    "art-025": (
        with_weights(lambda found: found.update({"model.norm.weight": torch.ones(HIDDEN + 1)})),
        SHAPE,
        rf"model\.norm\.weight.*{HIDDEN + 1}.*{HIDDEN}",
    ),
    "art-026": (
        with_weights(lambda found: found.update({"lm_head.weight": torch.ones(VOCABULARY, HIDDEN)})),
        FORM,
        r"lm_head\.weight.*model\.embed_tokens\.weight",
    ),
    "art-027": (in_manifest(format_version=2), VERSION, r"2.*1\.\.1"),
    "art-028": (twice_a_key, FORM, "model.*twice"),
    "art-029": (
        lambda path: os.truncate(path / "manifest.json", 200 << 20),
        FORM,
        f"{200 << 20}.*{16 << 20}",
    ),
    "art-030": (other_tokenizer, DIGEST, r"tokenizer\.json"),
    "art-032": (
        in_manifest(probes=[{"token_ids": [3, 4], "logprobs": [-99.0]}]),
        DIGEST,
        r"probes\[0\]\.logprobs\[0\].*difference.*\+-",
    ),
    "art-033-none": (in_manifest(probes=[]), FORM, "probes"),
    "art-033-token": (in_manifest(probes=[{"token_ids": [3, 99], "logprobs": [-1.0]}]), FORM, r"probes\[0\].*99"),
    "mdl-001": (lambda path: (path / "config.json").unlink(), MISSING, r"config\.json"),
    "mdl-002": (with_file("config.json", b""), FORM, r"config\.json"),
    "mdl-003": (with_file("config.json", DEEP), FORM, r"config\.json.*deeper"),
    "mdl-004": (
        both(with_json("config.json", auto_map={"AutoModel": "evil--x.Model"}), with_file("x.py", b"raise SystemExit")),
        REFUSED,
        r"config\.json auto_map",
    ),
    "mdl-005": (
        with_json("config.json", vision_config={"auto_map": {"AutoModel": "x.Y"}}),
        REFUSED,
        r"vision_config\.auto_map",
    ),
    "mdl-006": (with_json("config.json", trust_remote_code=True), REFUSED, r"config\.json trust_remote_code"),
    "mdl-007": (with_json("config.json", _attn_implementation="them/kernel"), REFUSED, "_attn_implementation"),
    "mdl-008": (with_json("tokenizer_config.json", auto_map={"A": "x"}), REFUSED, r"tokenizer_config\.json auto_map"),
    "mdl-009": (with_json("processor_config.json", auto_map={"A": "x"}), REFUSED, r"processor_config\.json"),
    "mdl-012": (only_pickled, REFUSED, r"pytorch_model\.bin.*safetensors"),
    "mdl-014": (
        sharded(**{"model.norm.weight": "../../other/model.safetensors"}),
        FORM,
        r"weight_map.*\.\./\.\./other",
    ),
    "mdl-015": (both(sharded(), lambda path: (path / "b.safetensors").unlink()), MISSING, r"b\.safetensors"),
    "mdl-016": (both(sharded(), in_two_shards), FORM, r"model\.norm\.weight.*a\.safetensors and b\.safetensors"),
    "mdl-017": (with_json("config.json", hidden_size=2 * HIDDEN), SHAPE, r"weight.*\[32, 16\].*\[32, 32\]"),
    "mdl-018": (with_json("config.json", vocab_size=10**9), SHAPE, "vocab_size"),
    "mdl-019-minus": (with_json("config.json", num_hidden_layers=-1), VALUE, "num_hidden_layers.*-1"),
    "mdl-019-zero": (with_json("config.json", num_hidden_layers=0), VALUE, "num_hidden_layers.*0"),
    "mdl-019-million": (with_json("config.json", num_hidden_layers=10**6), VALUE, "num_hidden_layers.*1000000"),
    "mdl-020": (with_json("config.json", max_position_embeddings="many"), VALUE, "max_position_embeddings"),
    "mdl-021": (
        with_json("config.json", rope_scaling={"rope_type": "linear", "factor": 0}),
        VALUE,
        r"rope_parameters\.factor",
    ),
    "mdl-022": (
        both(lambda path: (path / "generation_config.json").unlink(), with_json("config.json", eos_token_id=32)),
        VALUE,
        "eos_token_id",
    ),
    "mdl-023": (
        lambda path: (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[:-200]),
        FORM,
        r"tokenizer\.json",
    ),
    "mdl-024": (
        both(
            with_json("config.json", vocab_size=20),
            with_weights(
                lambda found: found.update(
                    {"model.embed_tokens.weight": found["model.embed_tokens.weight"][:20].clone()}
                )
            ),
        ),
        SHAPE,
        "31.*20 rows",
    ),
    "mdl-025": (slow_normalizer, REFUSED, "pattern"),
    "mdl-026-nan": (
        with_file("generation_config.json", b'{"temperature": NaN}'),
        VALUE,
        r"generation_config\.json temperature",
    ),
    "mdl-026-length": (with_json("generation_config.json", max_length=10**12), VALUE, "max_length.*1000000000000"),
    "mdl-027": (as_one_file(".gguf"), REFUSED, "GGUF"),
    "mdl-028-zero": (with_json("preprocessor_config.json", size={"height": 0}), VALUE, r"size\.height"),
    "mdl-028-bomb": (with_json("preprocessor_config.json", size={"height": 10**6}), VALUE, r"size\.height"),
}


def unpack(path: Path, folders: dict[str, Path], row: str) -> Path:
    return shutil.copytree(folders[MODEL if row.startswith("mdl") else "artifact"], path / "m")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No pickle is loaded, and nothing of the folder is imported."""
    monkeypatch.setattr(torch, "load", lambda *args, **more: pytest.fail("torch.load was called"))
    before = set(sys.modules)
    yield
    assert not {name for name in set(sys.modules) - before if name in ("x", "evil")}


@pytest.mark.parametrize("row", ROWS)
def test_it_is_refused_by_name(tmp_path, folders, row, capsys):
    damage, error, says = ROWS[row]
    path = unpack(tmp_path, folders, row)
    damage(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        LLM(path, kv_cache_memory_bytes=1 << 20)
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    assert _run(["verify", str(path), "--kv-cache-memory-bytes", "1048576"]) == 4
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("kind", [MODEL, "artifact"])
def test_what_is_not_damaged_is_taken(folders, kind):
    with LLM(folders[kind], kv_cache_memory_bytes=1 << 20) as llm:
        output = llm.generate([[3, 4]], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 3
    assert _run(["verify", str(folders[kind]), "--kv-cache-memory-bytes", "1048576"]) == 0


def test_art_024_weights_that_are_not_finite_are_taken_when_asked(tmp_path, folders):
    path = unpack(tmp_path, folders, "art")
    with_weights(lambda found: found["model.embed_tokens.weight"].__setitem__((9, 3), float("nan")))(path)
    executor = InProcessExecutor(path, ExecutorConfig(allow_nonfinite=True))
    assert executor.model_facts.vocab_size == VOCABULARY
    executor.stop()
    with pytest.raises(DIGEST, match="probes"):  # what they do to the answers is still found
        LLM(path, kv_cache_memory_bytes=1 << 20, allow_nonfinite=True)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_art_031_what_was_verified_is_what_is_read(tmp_path, folders, name):
    """Another process exchanges a file between the check and the use."""
    path = unpack(tmp_path, folders, "art")
    wanted = load_file(path / WEIGHTS)["model.norm.weight"]
    with open_model_folder(path) as folder:
        new = tmp_path / "new"
        if name == WEIGHTS:
            save_file({key: tensor + 1 for key, tensor in load_file(path / name).items()}, new)
        else:
            new.write_bytes((path / name).read_bytes().replace(b"2", b"3"))
        new.replace(path / name)
        assert torch.equal(folder.tensor("model.norm.weight"), wanted)
        if name != WEIGHTS:
            with pytest.raises(DIGEST, match=name):
                folder.read_bytes(name)


def test_art_031_the_servers_own_process_reads_what_the_manifest_says_too(tmp_path, folders):
    path = unpack(tmp_path, folders, "art")
    other_tokenizer(path)
    with pytest.raises(DIGEST, match="tokenizer"):
        Tokenizer.from_folder(path)


def test_art_034_what_a_killed_writer_left_is_no_artifact(tmp_path, folders):
    """The manifest is written last; the next writer's cleaning up is tested beside the writer."""
    path = unpack(tmp_path, folders, "art")
    (path / "manifest.json").unlink()
    with pytest.raises(MISSING, match=r"manifest\.json"):
        open_model_folder(path)


def test_mdl_010_a_template_reaches_nothing_outside(tmp_path, folders):
    path = unpack(tmp_path, folders, "mdl")
    proof = tmp_path / "proof"
    for code in (
        f"{{{{ cycler.__init__.__globals__.os.popen('touch {proof}').read() }}}}",
        f"{{{{ messages.__class__.__mro__[1].__subclasses__() }}}}{proof}",
    ):
        with_json("tokenizer_config.json", chat_template=code)(path)
        with pytest.raises(errors.RequestError, match="template"):
            Tokenizer.from_folder(path).apply_chat_template([{"role": "user", "content": "x"}])
    assert not proof.exists()


def test_mdl_013_a_pickle_beside_safetensors_is_left_alone_and_said(tmp_path, folders, caplog):
    path = unpack(tmp_path, folders, "mdl")
    (path / "pytorch_model.bin").write_bytes(b"never read")
    (path / "pytorch_model.bin").chmod(0)
    with caplog.at_level(logging.WARNING, "common_platform.artifact"), open_model_folder(path) as folder:
        assert "model.norm.weight" in folder.tensor_names
    assert "pytorch_model.bin" in caplog.text


def test_mdl_025_ten_thousand_characters_are_tokenized_in_time(tmp_path, folders):
    """Patterns that are taken are those that cannot blow up."""
    made = tokenizer()
    made.normalizer = normalizers.Replace("aa", "b")
    made.save(str(unpack(tmp_path, folders, "mdl") / "tokenizer.json"))
    start = time.monotonic()
    assert Tokenizer.from_folder(tmp_path / "m").encode("a" * 10_240 + "!")
    assert time.monotonic() - start < 60  # a pattern that blows up takes years


def test_every_row_is_here():
    numbers = {*ROWS, "art-031", "art-034", "mdl-010", "mdl-013"}
    elsewhere = {"mdl-011"}  # a template without an end: the server's tests, by its process
    every = {f"art-{i:03}" for i in range(1, 35)} | {f"mdl-{i:03}" for i in range(1, 29)}
    assert {number[:7] for number in numbers} | elsewhere == every
