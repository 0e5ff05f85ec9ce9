"""``trainkit info``: what this machine can train with."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

import trainkit
from common_platform.__main__ import report
from common_platform.platforms import detect

EXTRAS = {  # extra -> the library that it brings
    "cli": "jsonargparse",
    "lm": "peft",
    "mlflow": "mlflow-skinny",
    "onnx": "onnx",
    "plot": "matplotlib",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def info(*, as_json: bool) -> str:
    """The device's facts, and which extras are installed, as lines or as one JSON object."""
    platform = detect()
    extras = {extra: _version(library) for extra, library in EXTRAS.items()}
    if as_json:
        return json.dumps({"trainkit": trainkit.__version__, "platform": platform.to_dict(), "extras": extras})
    lines = [f"{'trainkit':<13}  {trainkit.__version__}"]
    lines += [f"{'extra ' + extra:<13}  {found or 'not installed'}" for extra, found in extras.items()]
    return "\n".join([report(platform), *lines])


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
