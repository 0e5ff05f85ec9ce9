"""Hooks come in Lightning's order with Lightning's arguments: recorded from the real one, in the same test."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.trainkit.tiny import child_environment

from trainkit import Callback, DataModule, TrainModule
from trainkit.hooks import HOOKS
from trainkit.hooks_page import page

SCRIPT = Path(__file__).parent / "parity" / "hook_order.py"
LIGHTNING = Path(__file__).parents[2] / ".peers" / "lightning" / "bin" / "python"
CASES = """fit accumulate mid_epoch max_steps every_second no_validation reload reload_second fast_dev_run
datamodule manual stops validate test test_datamodule predict checkpoints resume exception exception_step
exception_validation exception_test""".split()


def recorded(python: Path | str, library: str, folder: Path) -> dict[str, list[str]]:
    command = [str(python), str(SCRIPT), library, str(folder), *CASES]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=child_environment(OMP_NUM_THREADS="1"), check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return recorded(sys.executable, "trainkit", tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    if not LIGHTNING.exists():
        pytest.skip("no environment of Lightning: nox -s peers -- lightning")
    return recorded(LIGHTNING, "lightning", tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("exception")])
def test_every_hook_is_called_when_lightning_calls_it(ours, theirs, case):
    assert ours[case] == theirs[case]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("exception")])
def test_after_an_exception_there_is_also_a_teardown(ours, theirs, case):
    stage = "test" if case == "exception_test" else "fit"
    ending = [f"{who}.teardown({about}stage='{stage}')" for who, about in
              (("data", ""), ("callback", "Trainer, Module, "), ("module", ""))]  # fmt: skip
    assert [call for call in ours[case] if call not in ending] == theirs[case]
    assert [call for call in ours[case][-4:-1] if call in ending] == ending[case != "exception_test" :]


FIT = """
module.configure_callbacks module.prepare_data callback.setup module.setup module.configure_model
module.configure_optimizers callback.on_fit_start module.on_fit_start callback.on_sanity_check_start
"""


def test_a_fit_begins_and_ends_as_documented(ours):
    names = [call.partition("(")[0] for call in ours["fit"]]
    assert names[:9] == FIT.split()
    assert names[-6:] == [
        f"{who}.{hook}" for hook in ("on_train_end", "on_fit_end", "teardown") for who in ("callback", "module")
    ]


def test_keepers_of_checkpoints_save_after_the_module(ours):
    calls = [call.partition("(")[0] for call in ours["checkpoints"]]
    saves = [i for i, call in enumerate(calls) if call == "module.on_save_checkpoint"]
    assert len(saves) == 2
    for index in saves:
        assert calls[index - 3 : index] == [
            "module.on_train_epoch_end",
            "callback.state_dict",
            "callback.on_save_checkpoint",
        ]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_the_table_says_what_the_methods_take(hook):
    for owner, arguments, about in (
        (Callback, hook.callback, ["self", "trainer", "pl_module"]),
        (TrainModule, hook.module, ["self"]),
        (DataModule, hook.data, ["self"]),
    ):
        if arguments is None:
            assert not hasattr(owner, hook.name), f"{owner.__name__}.{hook.name} is not in the table"
        else:
            taken = inspect.signature(getattr(owner, hook.name)).parameters.values()
            plain = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
            assert plain == about + list(arguments)


def test_the_page_of_hooks_is_current():
    assert (Path(__file__).parents[2] / "docs" / "hooks.md").read_text() == page()
