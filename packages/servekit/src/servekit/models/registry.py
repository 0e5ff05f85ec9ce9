"""Which class runs which architecture: a table, and entry points that add to it."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common_platform.artifact import ModelFolder
from common_platform.errors import ArtifactConfigError
from servekit.core.facts import KVGroup
from servekit.kernels.native import Format, Library, Pool
from servekit.layers.attention import Attention, StepInputs
from servekit.layers.weights import Weights

BUILT_IN = {  # config.json's architectures -> where the class is; imported on first use
    "LlamaForCausalLM": "servekit.models.llama:Llama",
    "MistralForCausalLM": "servekit.models.llama:Llama",
    "Qwen2ForCausalLM": "servekit.models.llama:Llama",
    "Qwen3ForCausalLM": "servekit.models.llama:Llama",
}
NATIVE = dict.fromkeys(BUILT_IN, "servekit.models.native_llama:NativeLlama")  # on the C++ kernels


@dataclass(frozen=True, slots=True)
class Likely:
    """The highest logit of each row, not finite where none can be told, and which is the first: ``[rows]``."""

    highest: NDArray[np.float32]
    ids: NDArray[np.int64]


class CausalModel(Protocol):
    """A decoder as the model runner drives it."""

    vocab_size: int
    kv_groups: list[KVGroup]
    attentions: list[Attention]

    def __init__(self, weights: Weights, max_positions: int) -> None: ...

    def forward(self, step: StepInputs) -> Tensor:
        """The last hidden states, ``[tokens, hidden]``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab]`` float32."""


@runtime_checkable
class GreedyModel(Protocol):
    """A model that finds the most likely tokens in the same call, without writing all logits down."""

    def forward_greedy(self, step: StepInputs, places: NDArray[np.int64]) -> tuple[Tensor, Likely | None]:
        """As ``forward``, and what is most likely after the tokens at ``places``; None where it cannot tell."""


class NativeModel(CausalModel, Protocol):
    """A model on the C++ kernels."""

    def __init__(
        self, weights: Weights, max_positions: int, library: Library, pool: Pool, format: Format
    ) -> None:  # more than CausalModel's
        ...

    @staticmethod
    def reason_against(folder: ModelFolder) -> str | None:
        """Why it cannot run the model in ``folder``; None where it can."""


class NoNativeModel:
    """Stands for architectures that have none."""

    @staticmethod
    def reason_against(folder: ModelFolder) -> str | None:
        return "there are none for this architecture"


def architecture_of(folder: ModelFolder) -> str:
    """The one architecture that the config names.

    Raises:
        ArtifactConfigError: none, or one that nothing here runs.
    """
    named = folder.config.get("architectures")
    found = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(found, str) or found not in known_architectures():
        raise ArtifactConfigError(
            "config.json architectures", found, f"one of {', '.join(sorted(known_architectures()))}"
        )
    return found


def known_architectures() -> dict[str, str]:
    """A plugin adds names, it never replaces ours."""
    return {entry.name: entry.value for entry in entry_points(group="servekit.models")} | BUILT_IN


def model_class(architecture: str) -> type[CausalModel]:
    found: type[CausalModel] = pkgutil.resolve_name(known_architectures()[architecture])
    return found


def native_class(architecture: str) -> type[NativeModel]:
    """The class that runs it on the C++ kernels; ``NoNativeModel`` where there is none."""
    found: type[NativeModel] = pkgutil.resolve_name(NATIVE.get(architecture, f"{__name__}:NoNativeModel"))
    return found
