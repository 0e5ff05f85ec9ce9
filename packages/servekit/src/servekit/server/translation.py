"""Other forms of a chat become the one that ``read_chat`` knows; errors find their way back to the caller's fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common_platform.errors import RequestError
from servekit.server.chat import ChatRequest
from servekit.server.structured import renamed

MESSAGE = re.compile(r"messages\[(\d+)\](.*)", re.DOTALL)


@dataclass(slots=True)
class Translation:
    """A chat's body in the making, with the caller's name for each of its messages."""

    body: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)  # a field of the chat -> the caller's
    messages: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # of the messages

    def say(self, path: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.paths.append(path)

    def rename(self, error: RequestError) -> RequestError:
        """The error with the caller's path to the fault."""
        found = MESSAGE.fullmatch(error.param or "")
        if found is not None and int(found[1]) < len(self.paths):
            index = int(found[1])
            return renamed(error, {f"messages[{index}]": self.paths[index]})
        return renamed(error, self.names)

    def renamed(self, asked: ChatRequest) -> ChatRequest:
        """The request, which knows its fields by the caller's names from here on."""
        names = {ours: self._name_of(theirs) for ours, theirs in (asked.param_names or {}).items()}
        return replace(asked, param_names=names)

    def _name_of(self, path: str) -> str:
        return self.rename(RequestError(path)).param or path


def taken(checked: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields that have the same name and meaning in both forms."""
    return {name: checked[name] for name in names if name in checked}


def join_assistant(translation: Translation, path: str, more: dict[str, Any]) -> None:
    """Add to the assistant's message that comes last, or begin one: callers cut one message into several items."""
    last = translation.messages[-1] if translation.messages else None
    fits = last is not None and last["role"] == "assistant" and not (last.get("content") and more.get("content"))
    if last is None or not fits:
        translation.say(path, {"role": "assistant"} | more)
        return
    for name, value in more.items():
        last[name] = last[name] + value if name in last and name != "content" else value
