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
    matcher = engine().LLMatcher
    if spec.json is not None:
        return _from_schema(spec.json)
    if spec.json_object:
        return _from_schema('{"type": "object"}')
    if spec.regex is not None:
        return str(matcher.grammar_from_regex(spec.regex))
    if spec.choice is not None:
        return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in spec.choice)))
    if spec.lark is not None:
        return str(matcher.grammar_from_lark(spec.lark))
    text = spec.grammar or ""
    return _from_ebnf(text) if "::=" in text else str(matcher.grammar_from_lark(text))


def _from_schema(text: str) -> str:
    bare = text.strip()
    if bare == "false":
        raise RequestError("json", text, "a schema that some value fits", code="grammar_unsatisfiable")
    schema = "{}" if bare == "true" else text
    try:
        return str(engine().LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))
    except ValueError as error:
        raise RequestError("json", text, f"a JSON schema ({error})", code="grammar_invalid") from error


def _from_ebnf(text: str) -> str:
    try:
        return str(engine().grammar_from("ebnf", text))
    except ValueError as error:
        raise RequestError("grammar", str(error), "a grammar in Lark or EBNF", code="grammar_invalid") from error
