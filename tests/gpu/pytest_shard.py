"""A pytest plugin: some of the tests, each outcome written down as it comes, and a way out where the device breaks.

``GPU_SHARD`` is ``number/count``, ``GPU_PROGRESS`` the file.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.gpu.machine import stop_if_broken
from tests.gpu.progress import Progress

_progress = Progress(Path(os.environ["GPU_PROGRESS"]))
WHY = 400  # characters of a failure that are kept


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    number, count = map(int, os.environ["GPU_SHARD"].split("/"))
    items[:] = [item for place, item in enumerate(items) if place % count == number]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not _progress.begins(item.nodeid):
        pytest.skip("begun by an earlier process")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "earlier process" in str(report.longrepr):
        return
    if report.when == "call" or not report.passed:
        _progress.put(report.outcome, "outcomes", report.nodeid)
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _progress.put(str(crash.message if crash else report.longrepr)[:WHY], "failed", report.nodeid)
        stop_if_broken()
