"""Weights into a module, with a message that helps where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from common_platform.errors import CheckpointError

MOST_NAMES = 10


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy ``state`` into ``module``.

    Args:
        strict: whether every name must be there and no other.

    Raises:
        CheckpointError: names are missing or too many, or a shape is not that of the module.
    """
    own = module.state_dict()
    for name, tensor in state.items():
        there = own.get(name)
        if isinstance(there, Tensor) and isinstance(tensor, Tensor) and there.shape != tensor.shape:
            raise CheckpointError(name, f"shape {list(tensor.shape)}", f"{list(there.shape)}, the module's")
    if strict:
        for what, names in (("missing", own.keys() - state.keys()), ("not in the module", state.keys() - own.keys())):
            if names:
                shown = ", ".join(sorted(names)[:MOST_NAMES])
                raise CheckpointError(
                    "state_dict", message=f"{len(names)} tensors of the checkpoint are {what}: {shown}; allowed none, "
                    "change with strict=False"
                )  # fmt: skip
    module.load_state_dict(state, strict=False)
