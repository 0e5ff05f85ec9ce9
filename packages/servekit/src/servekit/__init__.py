"""servekit: serve a model. ``LLM`` runs it in this process, ``servekit serve`` behind an OpenAI-compatible server."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from servekit.engine.async_engine import AsyncEngine
    from servekit.engine.beam_search import BeamSearchOutput, BeamSearchParams
    from servekit.engine.config import EngineConfig
    from servekit.engine.output import CompletionOutput, RequestOutput
    from servekit.llm import LLM, EmbeddingOutput
    from servekit.sampling.parameters import SamplingParams

_PUBLIC = {
    "LLM": "servekit.llm",
    "SamplingParams": "servekit.sampling.parameters",
    "RequestOutput": "servekit.engine.output",
    "CompletionOutput": "servekit.engine.output",
    "EngineConfig": "servekit.engine.config",
    "BeamSearchParams": "servekit.engine.beam_search",
    "BeamSearchOutput": "servekit.engine.beam_search",
    "EmbeddingOutput": "servekit.llm",
    "AsyncEngine": "servekit.engine.async_engine",
}
__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import servekit`` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'servekit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
