"""A job of SLURM that puts itself back into the queue before its time is over."""

from __future__ import annotations

import os
import subprocess

from common_platform.errors import ResourceError

LIMIT_S = 60.0  # for the scheduler to answer


def job_id() -> str | None:
    """As scontrol wants it; None outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Whether this job has run before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0") or "0") > 0


def requeue(job: str) -> None:
    """Put ``job`` back into the queue.

    Raises:
        ResourceError: there is no scontrol, or it refused.
    """
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError("scontrol requeue", str(error), "SLURM's scontrol, answering in a minute") from error
    if done.returncode:
        raise ResourceError("scontrol requeue", done.stderr.strip() or done.returncode, "a job that may be requeued")
