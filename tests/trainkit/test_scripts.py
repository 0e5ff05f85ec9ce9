"""Scripts of Lightning's users run with only the import changed, and come to the same numbers."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tests.trainkit.tiny import child_environment

SCRIPTS = Path(__file__).parent / "parity" / "scripts.py"
LIGHTNING = Path(__file__).parents[2] / ".peers" / "lightning" / "bin" / "python"
NAMES = re.findall(r"^def (\w+)\(\) -> dict\[str, Any\]:", SCRIPTS.read_text(), re.MULTILINE)


def outcomes(library: str, folder: Path) -> dict:
    """Both run in Lightning's environment, which has torchmetrics."""
    if not LIGHTNING.exists():
        pytest.skip("no environment of Lightning: nox -s peers -- lightning")
    sources = [str(path / "src") for path in (Path(__file__).parents[2] / "packages").iterdir()]
    environment = child_environment(OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = ":".join([environment["PYTHONPATH"], *sources])
    run = subprocess.run(
        [str(LIGHTNING), str(SCRIPTS), library, str(folder), *NAMES],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return outcomes("lightning", tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return outcomes("trainkit", tmp_path_factory.mktemp("ours"))


def test_there_are_a_dozen():
    assert len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_script_comes_to_the_same(ours, theirs, name):
    learning_rates = {key for key in ours[name].get("metrics", {}) if key.startswith("lr-")}
    for found in (ours[name], theirs[name]):
        found["metrics"] = {k: v for k, v in found.get("metrics", {}).items() if k not in learning_rates}
    assert ours[name] == theirs[name]
