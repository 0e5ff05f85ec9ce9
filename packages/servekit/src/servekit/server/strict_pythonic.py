"""Strict calls as a Python list: ``[f(a=1, b="x"), g()]``. Arguments stand in the order of their schema.

A value is written as JSON, which the parser reads as well as Python's own words; ``True``, ``False`` and ``None`` may
stand for their JSON forms.
"""

from __future__ import annotations

import json
import re
from typing import Any

from servekit.server.call_schemas import DEFINITIONS
from servekit.server.parsers.pythonic import PYTHON_END, PYTHON_START
from servekit.server.strict_form import ANY, Calls, json_rule, regex_of

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
HELD = {"type", "properties", "required", "additionalProperties", "description", "title", "$schema", *DEFINITIONS}
WORDS = {"boolean": '"True" | "False"', "null": '"None"'}
VALUES = r"""
free: (one_of_free (NEXT one_of_free)*)?
one_of_free: /[A-Za-z_][A-Za-z0-9_]*/ "=" value
value: WORD | NUMBER | STRING | "[" (value (NEXT value)*)? "]" | "{" (pair (NEXT pair)*)? "}"
pair: STRING COLON value
WORD: "True" | "False" | "None" | "true" | "false" | "null"
NUMBER: /-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?/
STRING: /"([^"\\\n]|\\["\\nrt])*"|'([^'\\\n]|\\['\\nrt])*'/
COLON: /: ?/
NEXT: /, ?/
"""


def pythonic(calls: Calls) -> str | None:
    """The rules; None where a strict function's arguments are not simply named, or calls may stand behind reasoning."""
    if calls.reasoning:
        return None
    rules: list[str] = []
    heads: list[str] = []
    for index, tool in enumerate(calls.tools):
        function = tool["function"]
        name = json.dumps(function["name"] + "(")
        if not function.get("strict"):
            heads.append(f'{name} free ")"')
            continue
        arguments = _arguments(f"f{index}", function.get("parameters") or {})
        if arguments is None:
            return None
        rules += arguments
        heads.append(f'{name} f{index}_0_0 ")"')
    more = "(NEXT one)*" if calls.is_parallel else ""
    is_special = PYTHON_START in calls.special_ids and PYTHON_END in calls.special_ids
    marked = f" | {calls.mark(PYTHON_START)} calls {calls.mark(PYTHON_END)}" if is_special else ""
    unmarked = "" if is_special else f" & ~/{regex_of(PYTHON_START)}{ANY}/"
    text = [f"start: TEXT | calls{marked}", f'calls: "[" one {more} "]"', "one: " + " | ".join(heads), *rules]
    return "\n".join([*text, rf"TEXT: /([^\[\s]{ANY})?/{unmarked}"]) + VALUES


def _arguments(rule: str, schema: dict[str, Any]) -> list[str] | None:
    """Rules for each argument and what follows it: ``RULE_k_b``, where b tells whether one stands before it."""
    properties = schema.get("properties", {})
    if set(schema) - HELD or schema.get("additionalProperties", False) is not False:
        return None
    if not isinstance(properties, dict) or not all(NAME.fullmatch(name) for name in properties):
        return None
    definitions = {name: schema[name] for name in DEFINITIONS if name in schema}
    required = schema.get("required", [])
    made = [f'{rule}_{len(properties)}_{begun}: ""' for begun in (0, 1)]
    for place, (name, about) in enumerate(properties.items()):
        value = _value(about, definitions)
        for begun in (0, 1):
            given = f"{'NEXT ' if begun else ''}{json.dumps(name + '=')} ({value}) {rule}_{place + 1}_1"
            left_out = "" if name in required else f" | {rule}_{place + 1}_{begun}"
            made.append(f"{rule}_{place}_{begun}: {given}{left_out}")
    return made


def _value(schema: Any, definitions: dict[str, Any]) -> str:
    whole = json_rule((schema if isinstance(schema, dict) else {}) | definitions)
    words = (
        WORDS.get(schema.get("type", "")) if isinstance(schema, dict) and isinstance(schema.get("type"), str) else None
    )
    return f"{whole} | {words}" if words else whole
