"""Which parsers a model needs: named by the operator, or told by its chat template."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from servekit.server.parsers.base import Delta, Parser
from servekit.server.parsers.deepseek import DeepSeekParser
from servekit.server.parsers.harmony import HarmonyParser
from servekit.server.parsers.hermes import HermesParser
from servekit.server.parsers.llama3 import Llama3Parser
from servekit.server.parsers.mistral import MistralParser
from servekit.server.parsers.pythonic import PythonicParser
from servekit.server.parsers.reasoning import ReasoningParser

Make = Callable[[], Parser]
TOOL_PARSERS: dict[str, Make] = {  # vLLM's names
    "hermes": HermesParser,
    "llama3_json": Llama3Parser,
    "mistral": MistralParser,
    "deepseek_v3": DeepSeekParser,
    "deepseek_v31": DeepSeekParser,
    "pythonic": PythonicParser,
    "openai": HarmonyParser,
}
REASONING_PARSERS: dict[str, Make] = {
    "deepseek_r1": partial(ReasoningParser, "<think>", "</think>", begins_inside=True),
    "qwen3": partial(ReasoningParser, "<think>", "</think>", begins_inside=False),
    "mistral": partial(ReasoningParser, "[THINK]", "[/THINK]", begins_inside=False, is_special=True),
    "openai_gptoss": HarmonyParser,
}
TOOL_MARKS = {  # in a chat template -> the parser of its family
    "<|channel|>": "openai",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "[TOOL_CALLS]": "mistral",
    "<tool_call>": "hermes",
    "<|python_start|>": "pythonic",
    "<|python_tag|>": "llama3_json",
}


def tool_parser_of(template: str) -> str:
    """The name for a chat template; empty where no family is recognized."""
    return next((name for mark, name in TOOL_MARKS.items() if mark in template), "")


def reasoning_parser_of(template: str) -> str:
    if "<|channel|>" in template:
        return "openai_gptoss"
    if "[THINK]" in template:
        return "mistral"
    if "</think>" not in template:
        return ""
    tail = template[-400:]
    return "deepseek_r1" if "<think>" in tail and "</think>" not in tail else "qwen3"


class Pipeline:
    """Reasoning is split off first; what is left is searched for calls. Either parser may be missing."""

    def __init__(self, reasoning: Parser | None, tools: Parser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def is_plain(self) -> bool:
        """Whether nothing is looked for: all text is content."""
        return self._reasoning is None and self._tools is None

    def add(self, text: str) -> Delta:
        if self._reasoning is None:
            return self._searched(text)
        return self._after(self._reasoning.add(text))

    def finish(self) -> Delta:
        made = Delta() if self._reasoning is None else self._after(self._reasoning.finish())
        if self._tools is not None:
            made.add(self._tools.finish())
        return made

    def _after(self, delta: Delta) -> Delta:
        if self._tools is None:
            return delta
        made = self._searched(delta.content)
        made.reasoning = delta.reasoning
        return made

    def _searched(self, text: str) -> Delta:
        if self._tools is None:
            return Delta(text)
        return self._tools.add(text) if text else Delta()
