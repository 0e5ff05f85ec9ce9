"""Kernels go to the executor's device from every thread that launches some, also where it is not the first."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.tiny import make_folder

from servekit.execution import current_device, executor
from servekit.execution.choices import ExecutorConfig
from servekit.execution.current_device import make_current, numbered, on
from servekit.execution.executor import InProcessExecutor


class Driver:
    """Stands in for ``torch.cuda``: a current device for each thread, the first one at the beginning."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def current_device(self) -> int:
        return getattr(self._thread, "index", 0)

    def set_device(self, device: torch.device) -> None:
        self._thread.index = device.index


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(current_device.torch, "cuda", found)
    return found


def test_a_device_without_a_number_is_the_one_that_is_current(driver):
    driver.set_device(torch.device("cuda:1"))
    assert numbered(torch.device("cuda")) == torch.device("cuda:1")
    assert numbered(torch.device("cuda:3")) == torch.device("cuda:3")
    assert numbered(torch.device("cpu")) == torch.device("cpu")


def test_a_thread_is_told_and_others_are_not(driver):
    thread = threading.Thread(target=make_current, args=(torch.device("cuda:2"),))
    thread.start()
    thread.join(60)
    assert driver.current_device() == 0
    make_current(torch.device("cuda:2"))
    assert driver.current_device() == 2


def test_a_cpu_has_no_current_device():
    make_current(torch.device("cpu"))
    with on(torch.device("cpu")):
        assert torch.zeros(1).device.type == "cpu"


def test_every_thread_of_the_executor_is_told_its_device(tmp_path, monkeypatch):
    told: dict[str, torch.device] = {}
    monkeypatch.setattr(
        executor, "make_current", lambda device: told.setdefault(threading.current_thread().name, device)
    )
    one = InProcessExecutor(make_folder(tmp_path, vocab_size=300), ExecutorConfig(device="cpu", kernels="reference"))
    try:
        name = one._thread.submit(lambda: threading.current_thread().name).result(60)
        assert told == {name: one.device}
    finally:
        one.stop()
