"""The docstring data: real, split by module, the same on every call."""

import importlib
import inspect
import sys

import pytest

from common_platform.errors import ConfigError
from trainkit.lm.docstrings import docstring_examples


@pytest.fixture(scope="module")
def parts():
    return {split: docstring_examples(split) for split in ("train", "held_out")}


def test_both_parts_are_large_enough_to_train_and_to_judge(parts):
    assert len(parts["train"]) > 1000
    assert len(parts["held_out"]) > 200


def test_no_module_is_in_both_parts(parts):
    train, held_out = ({example.module.split(".")[0] for example in parts[split]} for split in parts)
    assert train
    assert held_out
    assert not train & held_out


def test_answers_are_what_the_running_library_says(parts):
    safe = {"textwrap", "shutil", "statistics", "fractions", "heapq", "queue", "string", "logging", "threading"}
    found = [e for part in parts.values() for e in part if e.module in safe]
    assert len(found) > 50
    for example in found:
        target = sys.modules.get(example.module) or importlib.import_module(example.module)
        for name in example.name.split("."):
            target = getattr(target, name)
        assert example.answer == inspect.cleandoc(target.__doc__).strip() or not inspect.isfunction(target)


def test_limits_hold_and_nothing_is_imported(parts):
    short = docstring_examples("train", min_chars=20, max_chars=80)
    assert all(20 <= len(e.answer) <= 80 for e in short)
    assert "antigravity" not in sys.modules
    assert all(len(e.as_chat()) == 2 for e in short)


def test_the_order_is_fixed_and_mixes_modules(parts):
    assert parts["held_out"] == docstring_examples("held_out")
    first = [e.module for e in parts["train"][:50]]
    assert len(set(first)) > 15


def test_another_split_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"split: got validation; allowed one of \('train', 'held_out'\)"):
        docstring_examples("validation")
