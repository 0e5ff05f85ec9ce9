"""transformers, where it is installed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from common_platform.errors import ResourceError


def transformers() -> ModuleType:
    """The library.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import transformers as library
    except ImportError as error:
        raise ResourceError("transformers", "not installed", "pip install 'trainkit[lm]'") from error
    return library


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in ``folder``; nothing is downloaded and no code of the folder runs."""
    return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
