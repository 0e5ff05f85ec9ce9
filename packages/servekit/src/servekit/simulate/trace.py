"""Workloads from a file: JSON lines, one request each, every field checked.

    {"arrival": 0.25, "prompt_tokens": 200, "output_tokens": 64, "prefix_group": "chat", "prefix_tokens": 128}

``arrival`` is in seconds. A prompt is ``token_ids``, or ``prompt_tokens`` made-up ones of which the first
``prefix_tokens`` are those of its ``prefix_group``. Lines of one ``session`` are its turns: a later one has all that
was said before in front of its prompt, and arrives ``think_s`` after the one before has ended, or at its own
``arrival`` where that is later. ``priority`` (lower first) and ``tenant`` are as for a real request.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from common_platform.errors import ConfigError
from servekit.simulate.job import FIRST_MADE_UP_ID, Job, MadeUpTokens

MOST_TOKENS = 1 << 24  # of one prompt or answer
MOST_PRIORITY = 1 << 31
MOST_CHARS = 256
MOST_SECONDS = 1e9
TOKEN_COUNT = (1, MOST_TOKENS)
INTEGERS = {
    "prompt_tokens": TOKEN_COUNT,
    "output_tokens": TOKEN_COUNT,
    "prefix_tokens": TOKEN_COUNT,
    "priority": (-MOST_PRIORITY, MOST_PRIORITY),
}
NAMES = ("tenant", "prefix_group", "session")
SECONDS = ("arrival", "think_s")
FIELDS = (*SECONDS, "token_ids", *INTEGERS, *NAMES)


def read_trace(path: str | Path) -> list[Job]:
    """The jobs of ``path``, in its order; later turns hang on the first of their session.

    Raises:
        ConfigError: the file cannot be read, has no request, or has a bad line; ``param`` is ``FILE:LINE.FIELD``.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError("trace", str(path), "a readable file", flag="--trace") from error
    reader = _Reader(Path(path).name)
    jobs = [reader.job(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise ConfigError("trace", str(path), "at least one line with a request", flag="--trace")
    return [job for job in jobs if job is not None]


class _Reader:
    """What lines share: prefixes and sessions."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._line = 0
        self._made = MadeUpTokens()
        self._groups: dict[str, range] = {}
        self._sessions: dict[str, Job] = {}  # their last turns so far

    def job(self, number: int, line: bytes) -> Job | None:
        """The job of a line; None for a turn that follows another one."""
        self._line = number
        body = self._checked(line)
        before = self._sessions.get(body["session"]) if "session" in body else None
        if before is None and "arrival" not in body:
            raise self._error("arrival", "missing", "seconds, 0 or more; only later turns of a session go without")
        if before is None and "think_s" in body:
            raise self._error("think_s", body["think_s"], "a session's second turn or a later one")
        said: tuple[Any, ...] = () if before is None else (*before.prompt, before.output)
        prompt = self._prompt(body)
        shared = len(prompt[0]) if "token_ids" in body else body.get("prefix_tokens", 0)
        job = Job(
            float(body.get("arrival", 0.0)),
            (*said, *prompt),
            self._made.take(body["output_tokens"]),
            body.get("priority", 0),
            body.get("tenant", ""),
            own_from=sum(map(len, said)) + shared,
        )
        if "session" in body:
            self._sessions[body["session"]] = job
        if before is None:
            return job
        before.follow_up, before.think_s = job, float(body.get("think_s", 0.0))
        return None

    def _prompt(self, body: dict[str, Any]) -> tuple[Any, ...]:
        if "token_ids" in body:
            return (tuple(body["token_ids"]),)
        count, shared = body["prompt_tokens"], body.get("prefix_tokens", 0)
        if not shared:
            return (self._made.take(count),)
        name = body["prefix_group"]
        if name not in self._groups:
            self._groups[name] = self._made.take(MOST_TOKENS)
        return (self._groups[name][:shared], self._made.take(count - shared))

    def _checked(self, line: bytes) -> dict[str, Any]:
        try:
            body = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise self._error("", line[:64].decode("utf-8", "replace"), f"one JSON object ({error})") from error
        if not isinstance(body, dict):
            raise self._error("", body, "one JSON object")
        for name, value in body.items():
            self._check(name, value)
        self._check_together(body)
        return body

    def _check(self, name: str, value: Any) -> None:
        if name in INTEGERS:
            low, high = INTEGERS[name]
            self._require(_is_integer(value, low, high), name, value, f"an integer, {low}..{high}")
        elif name in SECONDS:
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_SECONDS
            self._require(ok and math.isfinite(value), name, value, f"seconds, 0..{MOST_SECONDS:g}")
        elif name in NAMES:
            ok = isinstance(value, str) and 0 < len(value) <= MOST_CHARS
            self._require(ok, name, value, f"text of 1..{MOST_CHARS} characters")
        elif name == "token_ids":
            self._require(isinstance(value, list), name, value, "a list of token ids")
            self._require(0 < len(value) <= MOST_TOKENS, name, f"{len(value)} tokens", f"1..{MOST_TOKENS} tokens")
            for index, token in enumerate(value):
                ok = _is_integer(token, 0, FIRST_MADE_UP_ID - 1)
                self._require(ok, f"token_ids[{index}]", token, f"an integer, 0..{FIRST_MADE_UP_ID - 1}")
        else:
            raise self._error(name, value, f"one of {FIELDS}")

    def _check_together(self, body: dict[str, Any]) -> None:
        self._require("output_tokens" in body, "output_tokens", "missing", f"an integer, 1..{MOST_TOKENS}")
        if ("token_ids" in body) == ("prompt_tokens" in body):
            found = "both" if "token_ids" in body else "neither"
            raise self._error("prompt_tokens", found, "either prompt_tokens or token_ids")
        if ("prefix_group" in body) != ("prefix_tokens" in body):
            raise self._error("prefix_group", body.get("prefix_group"), "prefix_group and prefix_tokens together")
        if "prefix_tokens" in body:
            most = body.get("prompt_tokens", 0)
            self._require(body["prefix_tokens"] <= most, "prefix_tokens", body["prefix_tokens"], f"1..{most}")

    def _require(self, ok: bool, name: str, value: Any, limit: str) -> None:
        if not ok:
            raise self._error(name, value, limit)

    def _error(self, name: str, value: Any, limit: str) -> ConfigError:
        where = f"{self._file}:{self._line}" + (f".{name}" if name else "")
        return ConfigError(where, value, limit)


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
