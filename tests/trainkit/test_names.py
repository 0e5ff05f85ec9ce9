"""The names that a script of Lightning's uses are here with the same arguments; those that are not are listed here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tests.trainkit.test_scripts import LIGHTNING
from tests.trainkit.tiny import child_environment

NAMES = Path(__file__).parent / "parity" / "names.py"
HPARAMS_KEYS = {"CHECKPOINT_HYPER_PARAMS_KEY", "CHECKPOINT_HYPER_PARAMS_NAME", "CHECKPOINT_HYPER_PARAMS_TYPE"}
ABSENT = {  # of Lightning, and not here
    "Trainer": {"accelerator", "init_module", "predict_loop", "test_loop", "validate_loop", "val_check_batch"},
    "LightningModule": HPARAMS_KEYS | {
        "allow_zero_length_dataloader_with_multiple_devices", "configure_sharded_model", "device_mesh", "fabric",
        "on_gpu", "prepare_data_per_node", "remove_ignored_hparams", "to_tensorrt",
    },
    "LightningDataModule": HPARAMS_KEYS | {"name", "remove_ignored_hparams"},
    "Callback": set(),
}  # fmt: skip
ABSENT_CALLBACKS = {"EMAWeightAveraging", "ModelPruning", "WeightAveraging"}
ABSENT_ARGUMENTS = {("LightningDataModule", "load_from_checkpoint"): {"hparams_file", "weights_only"}}
HOOKS_ALONE = {"LambdaCallback"}  # takes every hook by name


@pytest.fixture(scope="module")
def libraries():
    if not LIGHTNING.exists():
        pytest.skip("no environment of Lightning: nox -s peers -- lightning")
    sources = [str(path / "src") for path in (Path(__file__).parents[2] / "packages").iterdir()]
    environment = child_environment(OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = ":".join([environment["PYTHONPATH"], *sources])
    found = []
    for library in ("lightning", "trainkit"):
        command = [str(LIGHTNING), str(NAMES), library]
        run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    return found


@pytest.mark.parametrize("name", ABSENT)
def test_a_class_has_all_names_but_those_that_are_listed(libraries, name):
    theirs, ours = (library["classes"][name] for library in libraries)
    assert set(theirs["names"]) - set(ours["names"]) == ABSENT[name]
    assert set(theirs["constructor"]) <= set(ours["constructor"])
    for method in theirs["methods"].keys() & ours["methods"].keys():
        missing = set(theirs["methods"][method]) - set(ours["methods"][method])
        assert missing == ABSENT_ARGUMENTS.get((name, method), set()), method


def test_callbacks_take_the_same_arguments(libraries):
    theirs, ours = (library["callbacks"] for library in libraries)
    assert theirs.keys() - ours.keys() == ABSENT_CALLBACKS
    for name in (theirs.keys() & ours.keys()) - HOOKS_ALONE:
        assert set(theirs[name]) <= set(ours[name]), name


def test_modules_lie_where_they_lie_there(libraries):
    theirs, ours = (library["modules"] for library in libraries)
    assert ours == theirs
