"""Checkpoints of Lightning, read without running what may be in them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from common_platform.errors import ArtifactRefused, CheckpointCorrupt, CheckpointIncomplete


def load_ckpt(path: Path) -> dict[str, Any]:
    """The dictionary in a ``.ckpt`` file: tensors and plain values.

    Raises:
        CheckpointIncomplete: there is no such file.
        CheckpointCorrupt: it is no checkpoint.
        ArtifactRefused: it is a pickle that names code; nothing of it has run.
    """
    if not path.is_file():
        raise CheckpointIncomplete("ckpt_path", path.name, "a checkpoint: a folder of ours, or a .ckpt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of pickles, which are refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactRefused(path.name, "a pickle with more than tensors and plain values", "weights only: load it "
                              "where you trust it, and save state_dict and hyper_parameters") from error  # fmt: skip
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointCorrupt(path.name, "a file that cannot be read", "a checkpoint") from error
    if not isinstance(state, dict) or "state_dict" not in state:
        raise CheckpointCorrupt(path.name, type(state).__name__, "a dictionary with 'state_dict'")
    return state
