"""Low-rank adapters by peft: made, saved alone, and merged into the weights before a hand-off. Hu et al. 2021."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from common_platform.errors import ConfigError, ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What the adapter looks like.

    Args:
        rank: of the two matrices beside each weight.
        alpha: the adapter's output is multiplied by ``alpha / rank``.
        dropout: of the adapter's input, a probability.
        target_modules: names of the layers that get one; "all-linear": every linear layer but the output embedding.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError("lora.rank", self.rank, "1 or more")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError("lora.alpha", self.alpha, "a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora.dropout", self.dropout, "in [0, 1)")


def add_adapter(model: nn.Module, lora: Lora) -> Any:
    """``model`` with a fresh adapter, which alone is trained; at first it changes nothing.

    Raises:
        ResourceError: peft is not installed.
        ConfigError: ``lora.target_modules`` fits no layer.
    """
    library = _peft()
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = library.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        with _old_names():
            return library.get_peft_model(model, config)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise ConfigError("lora.target_modules", lora.target_modules, "names of layers of the model") from error


def load_adapter(model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> Any:
    """``model`` with the adapter that ``save_adapter`` wrote to ``folder``.

    Raises:
        ConfigError: there is none. Only safetensors are read.
    """
    if not Path(folder, "adapter_model.safetensors").is_file():
        raise ConfigError("adapter", Path(folder).name, "a folder with adapter_model.safetensors")
    with _old_names():
        return _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, local_files_only=True)


def save_adapter(module: Any, folder: str | Path) -> Path:
    """Write the adapter alone: ``adapter_model.safetensors`` and ``adapter_config.json``, as peft reads them.

    Raises:
        ConfigError: ``module`` wears none.
    """
    model = _adapted(module)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    return Path(folder)


def merged(module: Any) -> Any:
    """A copy of the model with the adapter added into its weights; ``module`` stays as it is.

    Raises:
        ConfigError: ``module`` wears no adapter, or it would make a weight that is not finite.
    """
    model = copy.deepcopy(_adapted(module))
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError("adapter", "NaN or infinite weights", "a run that did not diverge") from error


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """``model`` as it was before it got its adapter."""
    with model.disable_adapter():
        yield


def has_adapter(model: Any) -> bool:
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


def _adapted(module: Any) -> Any:
    model = getattr(module, "model", module) if not has_adapter(module) else module
    if not has_adapter(model):
        raise ConfigError("adapter", type(model).__name__, "a module made with lora=Lora(...)")
    return model


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """peft asks transformers for things by names that it has renamed; nothing that a user could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _peft() -> ModuleType:
    try:
        import peft as library
    except ImportError as error:
        raise ResourceError("lora", "peft is not installed", "pip install 'trainkit[lm]'") from error
    return library
