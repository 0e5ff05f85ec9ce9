"""What makes a model one for embeddings: how its hidden states become one vector, and how long that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common_platform.artifact import ModelFolder, open_model_folder

POOLING = ("auto", "none", "last", "mean")
SENTENCE_TRANSFORMERS = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """``pooling`` is empty where the model is not served for embeddings."""

    pooling: str
    size: int  # floats of a vector


def embedding_model(folder: str | Path, wanted: str) -> EmbeddingModel:
    """Args: wanted: one of ``POOLING``; ``auto`` looks for the files of Sentence Transformers."""
    with open_model_folder(folder, verify=False) as opened:
        size = int(opened.read_json("config.json").get("hidden_size", 0))
        kind = _pooling_of(opened) if wanted == "auto" else wanted
    return EmbeddingModel("" if kind == "none" else kind, size)


def _pooling_of(folder: ModelFolder) -> str:
    name = "1_Pooling/config.json"
    settings = folder.read_json(name) if folder.has(name) else {}
    return next((kind for mode, kind in SENTENCE_TRANSFORMERS.items() if settings.get(mode) is True), "none")
