"""``strict`` functions where the model is free to call: text as it likes, and calls only as their schemas say.

Written as one grammar in Lark, the dialect of llguidance: free text up to the mark with which the model's family
begins a call, then a call. Marks that are special tokens cannot stand in text, and are named by their ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from servekit.server.parsers.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from servekit.server.parsers.harmony import CHANNEL, CONSTRAIN, MESSAGE, START
from servekit.server.parsers.hermes import BEGIN as HERMES_BEGIN
from servekit.server.parsers.hermes import END as HERMES_END
from servekit.server.parsers.llama3 import PYTHON_TAG
from servekit.server.parsers.mistral import ARGS
from servekit.server.parsers.mistral import BEGIN as MISTRAL_BEGIN
from servekit.server.strict_form import ANY, Calls, regex_of
from servekit.server.strict_pythonic import pythonic

THINKING = {"qwen3": ("<think>", "</think>"), "deepseek_r1": ("", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


def strict_grammar(parser: str, calls: Calls) -> str | None:
    """The Lark text for the family of ``parser``; None where its calls cannot be held to a schema."""
    write = FAMILIES.get(parser)
    text = None if write is None else write(calls)
    return None if text is None else "%llguidance {}\n" + text


def _among_text(calls: Calls, begin: str, body: str) -> str:
    """Text, then ``begin`` and ``body``, any number of times; reasoning at its beginning is not searched."""
    thinking = _thinking(calls)
    if begin in calls.special_ids:
        rules = f"called: TEXT {calls.mark(begin)} {body}\ntail: TEXT\n"
    else:
        mark = regex_of(begin)
        rules = f"begun[lazy]: /{ANY}{mark}/{thinking.excluded}\ncalled: begun {body}\n"
        rules += f"tail: TAIL\nTAIL: TEXT & ~/{ANY}{mark}{ANY}/{thinking.excluded}\n"
    return f"start: {thinking.in_front}called{calls.times} tail\n{thinking.rules}{rules}TEXT: /{ANY}/\n"


@dataclass(frozen=True, slots=True)
class _Thinking:
    """Reasoning in a grammar: where it stands, its rules, and what text must not be, lest it be taken for text."""

    in_front: str = ""
    rules: str = ""
    excluded: str = ""


def _thinking(calls: Calls) -> _Thinking:
    if calls.reasoning not in THINKING:
        return _Thinking()
    begin, end = THINKING[calls.reasoning]
    if begin in calls.special_ids and end in calls.special_ids:
        return _Thinking("thinking? ", f"thinking: {calls.mark(begin)} TEXT {calls.mark(end)}\n")
    if not begin:  # the prompt ends within it
        rules = f"thinking: TEXT {calls.mark(end)}\n" if end in calls.special_ids else _up_to(ANY, end)
        return _Thinking("thinking ", rules)
    head = rf"\s*{regex_of(begin)}{ANY}"
    return _Thinking("thinking? ", _up_to(head, end), f" & ~/{head}/")


def _up_to(text: str, end: str) -> str:
    return f"thinking[lazy]: /{text}{regex_of(end)}/\n"


def _hermes(calls: Calls) -> str:
    end = f'"\\n" {calls.mark(HERMES_END)}' if HERMES_END in calls.special_ids else json.dumps("\n" + HERMES_END)
    return _among_text(calls, HERMES_BEGIN, f'"\\n" {calls.any_json_call("arguments")} {end}')


def _llama3(calls: Calls) -> str | None:
    """The whole answer is calls or none is: text that begins with a brace would be read as one."""
    if calls.reasoning:
        return None  # they may stand behind it
    more = '("; " one)*' if calls.is_parallel else ""
    tagged = f" | {calls.mark(PYTHON_TAG)} calls" if PYTHON_TAG in calls.special_ids else ""
    rules = f"start: TEXT | calls{tagged}\ncalls: one {more}\none: {calls.any_json_call('parameters')}\n"
    return rules + f"TEXT: /([^{{\\s]{ANY})?/\n"


def _mistral(calls: Calls) -> str:
    """A list of calls, or name and arguments: a model writes the one that it was trained to."""
    one = calls.any_json_call("arguments")
    more = f'(", " {one})*' if calls.is_parallel else ""
    named = [
        f"{json.dumps(name)} {calls.mark(ARGS) + ' ' if ARGS in calls.special_ids else ''}{calls.arguments(index)}"
        for index, name in enumerate(calls.names())
    ]
    listed = f'"[" {one} {more} "]"'
    return _among_text(calls, MISTRAL_BEGIN, "(" + " | ".join([listed, *named]) + ")")


def _deepseek(calls: Calls, head: str, tail: str, *, has_kind: bool) -> str:
    begin, sep, end = calls.mark(CALL_BEGIN), calls.mark(SEP), calls.mark(CALL_END)
    kind = f'"function" {sep} ' if has_kind else ""
    many = [
        f"{kind}{json.dumps(name + head)} {'' if has_kind else sep} {calls.arguments(index)} {tail}"
        for index, name in enumerate(calls.names())
    ]
    one = f"{begin} ({' | '.join(many)}) {end}"
    more = f'("\\n"? {one})*' if calls.is_parallel else ""
    return _among_text(calls, CALLS_BEGIN, f"{one} {more} {calls.mark(CALLS_END)}")


def _deepseek_v3(calls: Calls) -> str:
    return _deepseek(calls, "\n```json\n", '"\\n```"', has_kind=True)


def _deepseek_v31(calls: Calls) -> str:
    return _deepseek(calls, "", "", has_kind=False)


def _harmony(calls: Calls) -> str | None:
    """Messages in channels: those to a function hold its arguments."""
    if not all(mark in calls.special_ids for mark in (START, CHANNEL, MESSAGE, CONSTRAIN, "<|end|>")):
        return None
    channel, message, end = calls.mark(CHANNEL), calls.mark(MESSAGE), calls.mark("<|end|>")
    kind = f'(" "? {calls.mark(CONSTRAIN)} "json" | " json")?'
    turns = [f"{channel} /analysis|commentary|final/ {message} /{ANY}/"]
    for index, name in enumerate(calls.names()):
        to = f" to=functions.{name}"
        heads = f'({json.dumps(to)} {channel} "commentary" | {channel} {json.dumps("commentary" + to)})'
        turns.append(f"{heads} {kind} {message} {calls.arguments(index)}")
    return f'start: turn ({end} {calls.mark(START)} "assistant" turn)*\nturn: ' + "\n    | ".join(turns) + "\n"


FAMILIES: dict[str, Callable[[Calls], str | None]] = {
    "hermes": _hermes,
    "llama3_json": _llama3,
    "mistral": _mistral,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
    "openai": _harmony,
    "pythonic": pythonic,
}
