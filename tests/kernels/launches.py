"""A pytest plugin: which variants of kernels the tests of an interpreting process launch, in a file of its own.

``KERNEL_LAUNCHES`` is the folder. ``test_launched.py`` compiles them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kernels.variants import variants, write


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    with variants() as found:
        result = yield
    folder = Path(os.environ["KERNEL_LAUNCHES"])
    folder.mkdir(parents=True, exist_ok=True)
    write(found, folder / f"{os.getpid()}.jsonl")
    return result
