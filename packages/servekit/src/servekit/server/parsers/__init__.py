"""What a model wrote, taken apart: reasoning, answer, and calls of tools. Model output is data: read, never run."""

from servekit.server.parsers.base import CallDelta, Delta, Parser

__all__ = ["CallDelta", "Delta", "Parser"]
