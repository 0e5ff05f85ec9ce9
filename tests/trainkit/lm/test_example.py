"""The example of adapters and preferences, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tiny import make_folder

from common_platform.artifact import open_model_folder

EXAMPLE = Path(__file__).parents[3] / "examples" / "adapt_and_align.py"


def test_it_ends_with_an_artifact_and_an_adapter(tmp_path):
    base = make_folder(tmp_path / "base", "llama-tied")
    command = [sys.executable, str(EXAMPLE), "--model", str(base), "--steps", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    with open_model_folder(tmp_path / "out" / "model"):
        pass
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "train_accuracy" in (tmp_path / "out" / "dpo" / "logs" / "version_0" / "metrics.csv").read_text()
