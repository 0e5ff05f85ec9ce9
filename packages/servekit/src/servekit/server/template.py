"""What a model's chat template says about the model, by its text alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError, meta

from common_platform.artifact import open_model_folder
from common_platform.errors import ConfigError
from servekit.engine.chat_template import environment, special_tokens, template_source
from servekit.server.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, reasoning_parser_of, tool_parser_of

AUTO, NONE = "auto", "none"
OF_EVERY_TEMPLATE = frozenset({"raise_exception", "strftime_now"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatModel:
    """How to talk with the model: ``source`` is None where it has no template, a parser's name empty for none."""

    source: str | None
    special: dict[str, str]
    variables: frozenset[str]  # that the template reads from outside: the only ones a caller may set
    tool_parser: str
    reasoning_parser: str
    special_ids: Mapping[str, int] = field(default_factory=dict)  # of the tokenizer's special tokens, by their text

    @property
    def shows_tools(self) -> bool:
        return "tools" in self.variables


def chat_model(
    folder: str | Path,
    *,
    tool_parser: str,
    reasoning_parser: str,
    template_file: str | None = None,
    special_ids: Mapping[str, int] | None = None,
) -> ChatModel:
    """What to say to the model in ``folder``, and how to read it.

    Args:
        tool_parser, reasoning_parser: a name, ``none``, or ``auto`` for what the template tells.
        template_file: with a template to use in place of the model's own.

    Raises:
        ConfigError: a name is not known, or the template is none.
    """
    _check("tool_call_parser", tool_parser, TOOL_PARSERS)
    _check("reasoning_parser", reasoning_parser, REASONING_PARSERS)
    with open_model_folder(folder, verify=False) as opened:
        config = opened.read_json("tokenizer_config.json") if opened.has("tokenizer_config.json") else {}
        source = template_source(opened, config) if template_file is None else _text_of(template_file)
    special = special_tokens(config)
    return ChatModel(
        source=source,
        special=special,
        variables=frozenset() if source is None else _variables(source) - OF_EVERY_TEMPLATE - set(special),
        tool_parser=_chosen(tool_parser, tool_parser_of(source or "")),
        reasoning_parser=_chosen(reasoning_parser, reasoning_parser_of(source or "")),
        special_ids=special_ids or {},
    )


def _text_of(template_file: str) -> str:
    try:
        return Path(template_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        name = Path(template_file).name
        raise ConfigError("chat_template", name, "a readable text file", flag="--chat-template") from error


def _variables(source: str) -> frozenset[str]:
    try:
        return frozenset(meta.find_undeclared_variables(environment().parse(source)))
    except TemplateError as error:
        raise ConfigError("chat_template", str(error), "a Jinja template") from error


def _chosen(wanted: str, told: str) -> str:
    return told if wanted == AUTO else "" if wanted == NONE else wanted


def _check(name: str, value: str, known: Iterable[str]) -> None:
    if value not in (AUTO, NONE, *known):
        flag = "--" + name.replace("_", "-")
        raise ConfigError(name, value, f"auto, none or one of {', '.join(known)}", flag=flag)
