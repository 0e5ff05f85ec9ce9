"""Exports: models that leave trainkit."""

from trainkit.export.handoff import handoff
from trainkit.export.onnx_files import load_onnx

__all__ = ["handoff", "load_onnx"]
