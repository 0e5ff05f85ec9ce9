"""The embedded model: made once, whole, and found again."""

import json

import pytest

from common_platform import embedded
from common_platform.errors import ArtifactDigestMismatch, ResourceError


def test_the_folder_is_made_once_and_is_an_ordinary_model_folder():
    folder = embedded.smollm2()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert embedded.smollm2() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()


def test_another_file_in_its_place_is_refused(monkeypatch, tmp_path):
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(embedded, "_installed_gguf", lambda: fake)
    with pytest.raises(ArtifactDigestMismatch, match="SmolLM2"):
        embedded.unpack_gguf(tmp_path)


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("COMMON_PLATFORM_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "NEEDS", ("a_library_that_is_not_there",))
    with pytest.raises(ResourceError, match=r"a_library_that_is_not_there.*pip install"):
        embedded.smollm2()
    assert list(tmp_path.iterdir()) == []
