"""The progress bar: a bar in a terminal, lines elsewhere, and the terminal as it was, also after Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

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
