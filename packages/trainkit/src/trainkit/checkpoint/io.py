"""How checkpoints get to the disk: at once, or while training goes on."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from trainkit.checkpoint.folder import Prepared, prepare, write

Job = Callable[[], None]


class CheckpointIO:
    """Writes before it returns."""

    def save(self, path: str | Path, model: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint at ``path``.

        Raises:
            CheckpointWriteError: it, or one before it, could not be written.
            CheckpointError: ``state`` holds something that cannot be written.
        """
        write(path, prepare(model, state))

    def then(self, job: Job) -> None:
        """Run ``job`` when all that was saved is on the disk; not at all where some could not be written."""
        job()

    def remove(self, path: str | Path) -> None:
        """Remove a checkpoint, when those that were saved after it are whole."""
        self.then(lambda: _remove(Path(path)))

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            CheckpointWriteError: something could not be written.
        """


class AsyncCheckpointIO(CheckpointIO):
    """Copies the state and returns; a thread hashes and writes it. One checkpoint is on its way at a time.

    Use it as ``Trainer(plugins=[AsyncCheckpointIO()])``. What cannot be written is an error of the next save, or of the
    end of training. The copy needs as much memory again as the checkpoint takes.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    def save(self, path: str | Path, model: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.wait()
        prepared: Prepared = prepare(model, state, copy=True)
        self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoint-writer")
        self._thread.start()
        self._jobs.put(lambda: write(path, prepared))

    def then(self, job: Job) -> None:
        if self._thread is None:
            job()
        else:
            self._jobs.put(job)

    def wait(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._problem is None:
                    job()
            except Exception as error:  # noqa: BLE001 - raised by the next call of wait
                self._problem = error


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
