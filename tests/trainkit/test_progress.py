"""The progress bar: a bar in a terminal, lines elsewhere, and the terminal as it was, also after Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import torch
from tests.trainkit.tiny import Regression, child_environment, loaders, trainer

from trainkit.callbacks import ProgressBar

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
CHILD = """
import sys, time
from pathlib import Path
from tests.trainkit.tiny import Regression, loaders, trainer
from trainkit.callbacks import Callback, ProgressBar

class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.05)

train, val = loaders()
trainer(Path(sys.argv[1]), max_epochs=100, callbacks=[Slow(), ProgressBar()]).fit(Regression(), train, val)
"""


def test_without_a_terminal_there_are_plain_lines(tmp_path, capfd):
    train, val = loaders()
    trainer(tmp_path, max_epochs=2, callbacks=[ProgressBar()]).fit(Regression(), train, val)
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("epoch 1 step 16 loss=") for line in lines)
    assert "\x1b" not in "".join(lines)


def test_what_is_shown_can_be_chosen(tmp_path, capfd):
    class Own(ProgressBar):
        def get_metrics(self, trainer, pl_module):
            return {name: v for name, v in super().get_metrics(trainer, pl_module).items() if name == "lr"} | {
                "run": "a7"
            }

    fit = trainer(tmp_path, max_epochs=1, callbacks=[Own(plain_every_s=0.0)])
    fit.fit(Regression(), *loaders())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch 0")]
    assert lines
    assert all("lr=" in line and "run=a7" in line and "loss=" not in line for line in lines)


def test_control_c_gives_the_terminal_back_as_it_was(tmp_path):
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environment = child_environment(TERM="xterm", COLUMNS="100")
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    shown = b""
    try:
        shown = _read_until(ours, lambda text: text.count(b"training") > 3, 60)
        process.send_signal(signal.SIGINT)
        shown += _read_until(ours, lambda text: process.poll() is not None, 30)
        assert process.wait(10) == -signal.SIGINT
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert HIDE in shown
    assert shown.rfind(SHOW) > shown.rfind(HIDE)


def _read_until(descriptor: int, done, limit_s: float) -> bytes:
    text, deadline = b"", time.monotonic() + limit_s
    while not done(text) and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.1)[0]:
            text += os.read(descriptor, 65536)
    while select.select([descriptor], [], [], 0.2)[0]:
        text += os.read(descriptor, 65536)
    return text


def test_lines_tell_the_throughput_and_the_time_left(tmp_path, capfd):
    train, val = loaders()
    trainer(tmp_path, max_epochs=2, callbacks=[ProgressBar(plain_every_s=0)]).fit(Regression(), train, val)
    lines = [line for line in capfd.readouterr().err.splitlines() if " step 8 " in line]
    assert re.search(r" \d[\d.e+]* samples/s left=\d:\d\d:\d\d$", lines[0])


def test_tokens_are_counted_without_padding():
    bar = ProgressBar()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    bar._count({"input_ids": torch.zeros(2, 3), "attention_mask": mask})
    assert bar._items == 3
    bar._count({"input_ids": torch.zeros(1, 7)})
    assert bar._items == 10
    assert bar._throughput().endswith("tokens/s")
