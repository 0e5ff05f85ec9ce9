"""A constraint as a request states it, in the words of the grammar engine."""

from __future__ import annotations

import json
from typing import Any

from common_platform.errors import RequestError, ResourceError
from servekit.sampling.parameters import StructuredOutput

# One spelling of white space, so that what is forced can be jumped over and no model can run away in blanks.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


def engine() -> Any:
    """The module ``llguidance``."""
    try:
        import llguidance
    except ImportError as error:
        raise ResourceError(
            "structured_outputs",
            "llguidance is not installed",
            "pip install 'servekit[grammar]'",
            code="library_missing",
        ) from error
    return llguidance


def field_of(spec: StructuredOutput) -> str:
    """The name of the one field that is set."""
    return next(name for name in spec.__struct_fields__ if getattr(spec, name) not in (None, False))


def to_grammar(spec: StructuredOutput) -> str:
    """The grammar engine's own text for ``spec``.

    Raises:
        RequestError: code ``grammar_invalid``; whether the grammar is right is known only once it is compiled.
    """
    llguidance = engine()
    matcher = llguidance.LLMatcher
    if spec.json is not None:
        return str(matcher.grammar_from_json_schema(spec.json, overrides=JSON_STYLE))
    if spec.json_object:
        return str(matcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_STYLE))
    if spec.regex is not None:
        return str(matcher.grammar_from_regex(spec.regex))
    if spec.choice is not None:
        return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in spec.choice)))
    text = spec.grammar or ""
    if "::=" not in text:
        return str(matcher.grammar_from_lark(text))
    try:
        return str(llguidance.grammar_from("ebnf", text))
    except ValueError as error:
        raise RequestError("grammar", str(error), "a grammar in Lark or EBNF", code="grammar_invalid") from error
