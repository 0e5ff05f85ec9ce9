"""Reading a model's tensors, checked against the shapes that its config asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common_platform.artifact import ModelFolder
from common_platform.errors import ArtifactShapeError
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
    """

    def __init__(
        self,
        folder: ModelFolder,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
        kernels: Kernels = FASTEST,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.ranks = ranks
        self.kernels = kernels
        self.num_parameters = 0

    def has(self, name: str) -> bool:
        return name in self._names

    @property
    def _names(self) -> set[str]:
        if not hasattr(self, "_name_set"):
            self._name_set = set(self.folder.tensor_names)
        return self._name_set

    def read(self, name: str, shape: tuple[int, ...], part: Callable[[Tensor], Tensor] = lambda whole: whole) -> Tensor:
        """This rank's ``part`` of the tensor ``name``, still in the file's dtype and mapped.

        Raises:
            ArtifactMissing: there is no such tensor.
            ArtifactShapeError: it has another shape than ``shape``, the whole one that the config implies.
        """
        found = self.folder.shape(name)
        if found != shape:
            raise ArtifactShapeError(name, list(found), f"{list(shape)}, as config.json implies")
        mine = part(self.folder.tensor(name))
        self.num_parameters += mine.numel()
        return mine

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
