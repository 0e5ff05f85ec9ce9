"""Reading a model's tensors, checked against the shapes that its config asks for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common_platform.artifact import ModelFolder
from common_platform.errors import ArtifactFormatError, ArtifactRefused, ArtifactShapeError
from servekit.layers.kernels import Kernels
from servekit.layers.parallel import Ranks

FASTEST = Kernels()


class Weights:
    """The tensors of a folder, as they are wanted: dtype and device of the run, each part read once.

    Args:
        folder: where the tensors are mapped from.
        dtype: what floating-point weights become.
        device: where they go.
        ranks: who shares them.
        kernels: what the layers made from them call.
        allow_nonfinite: take weights of a hand-off artifact that are no finite numbers.
    """

    def __init__(
        self,
        folder: ModelFolder,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
        kernels: Kernels = FASTEST,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.ranks = ranks
        self.kernels = kernels
        self.num_parameters = 0
        self._must_be_finite = folder.manifest is not None and not allow_nonfinite

    def has(self, name: str) -> bool:
        return name in self._names

    @property
    def _names(self) -> set[str]:
        if not hasattr(self, "_name_set"):
            self._name_set = set(self.folder.tensor_names)
        return self._name_set

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        part: Callable[[Tensor], Tensor] = lambda whole: whole,
        *,
        implied_by: str = "",
    ) -> Tensor:
        """This rank's ``part`` of the tensor ``name``, still in the file's dtype and mapped.

        Args:
            implied_by: the keys of the config that ``shape`` comes from.

        Raises:
            ArtifactMissing: there is no such tensor.
            ArtifactShapeError: it has another shape than ``shape``, the whole one that the config implies.
            ArtifactRefused: the tensor of a hand-off artifact holds what is no finite number.
        """
        found = self.folder.shape(name)
        if found != shape:
            raise ArtifactShapeError(name, list(found), f"{list(shape)}, as config.json implies {implied_by}".strip())
        mine = part(self.folder.tensor(name))
        if self._must_be_finite and mine.is_floating_point():
            _check_finite(name, mine)
        self.num_parameters += mine.numel()
        return mine

    def read_embeddings(self, name: str, vocab_size: int, hidden_size: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        """``read`` for a matrix of the vocabulary: where it does not fit, the config's keys are named."""
        return self.read(name, (vocab_size, hidden_size), part, implied_by="by vocab_size and hidden_size")

    def check_tied(self, name: str, other: str) -> None:
        """Raise ArtifactFormatError where a config ties two tensors, and the file has both with different values."""
        if not (self.has(name) and self.has(other)):
            return
        if not torch.equal(self.folder.tensor(name), self.folder.tensor(other)):
            limit = f"the values of {other}, for config.json says tie_word_embeddings"
            raise ArtifactFormatError(name, "other values", limit)

    def settle(self, *parts: Tensor) -> Tensor:
        """The parts one below the other, in the dtype and on the device of the run.

        One part that needs no change stays mapped, and its pages are shared with other processes.
        """
        if len(parts) == 1:
            return parts[0].to(self.device, self.dtype).contiguous()
        rows = sum(part.shape[0] for part in parts)
        out = torch.empty((rows, *parts[0].shape[1:]), dtype=self.dtype, device=self.device)
        torch.cat([part.to(self.device, self.dtype) for part in parts], out=out)
        return out


def _check_finite(name: str, tensor: Tensor) -> None:
    if math.isfinite(float(tensor.sum(dtype=torch.float64))):  # one pass and no copy; then all of them are
        return
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    if count:
        raise ArtifactRefused(name, f"{count} values that are not finite", "finite numbers", flag="--allow-nonfinite")
