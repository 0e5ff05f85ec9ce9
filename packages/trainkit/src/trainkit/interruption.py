"""What a run does about the signals that it heard, between two batches, when its state is whole."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import torch

from trainkit import slurm
from trainkit.ranks import rank_zero_info
from trainkit.signals import EXIT_STATUS

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

NOTHING, SAVE, END = 0, 1, 2


class Interruption:
    """The signals of one run."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._wish = NOTHING
        self._is_alone = trainer.world_size == 1

    def hear(self, number: int) -> None:
        """Called by the handler: only remembers."""
        self._wish = max(self._wish, END if number == signal.SIGTERM else SAVE)
        self._trainer.received_sigterm |= number == signal.SIGTERM

    @property
    def is_wished(self) -> bool:
        """Whether a signal was heard that nothing was done about yet."""
        return self._wish != NOTHING

    def between_batches(self) -> None:
        """Do what was wished for.

        Raises:
            SystemExit: with status 143, once a checkpoint is on disk, if one is kept at all.
        """
        wish = self._wish
        if self._is_alone and wish == NOTHING:
            return
        trainer = self._trainer
        if not self._is_alone:  # all ranks act at once, so they ask each other, but not at every step
            if trainer.progress.total_batches % max(trainer.log_every_n_steps, 1):
                return
            wish = int(trainer.strategy.reduce(torch.tensor(float(wish)), "max"))
        if wish == NOTHING:
            return
        self._wish = NOTHING
        job = slurm.job_id() if wish == SAVE else None
        if trainer.checkpoint_callback is not None:
            trainer.checkpoint_callback.save_last_now(trainer)
        elif wish == SAVE:
            trainer.save_checkpoint(trainer.checkpoint_dir / "last.ckpt")
        if wish == SAVE and job is None:
            rank_zero_info(f"saved on SIGUSR1 at step {trainer.global_step}")
            return
        trainer.checkpoint_io.wait()
        if job is not None and trainer.is_global_zero:
            slurm.requeue(job)
        raise SystemExit(EXIT_STATUS)
