"""Chat templates: the Jinja that a model brings along, in a sandbox. Knows no tokens and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common_platform.errors import RequestError

if TYPE_CHECKING:
    from common_platform.artifact import ModelFolder

FILE = "chat_template.jinja"


def environment() -> ImmutableSandboxedEnvironment:
    """What Transformers gives a template, and no more."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def template_source(folder: ModelFolder, config: Mapping[str, Any]) -> str | None:
    """The model's own template. Args: config: what ``tokenizer_config.json`` says."""
    if folder.has(FILE):
        return folder.read_bytes(FILE).decode("utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source if isinstance(source, str) else None


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and its like, which templates write."""
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }


def variables_for(
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] | None,
    special: Mapping[str, str],
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that a template may read."""
    about = {"tools": list(tools) if tools else None, "documents": None, "add_generation_prompt": add_generation_prompt}
    return {"messages": list(messages)} | about | dict(special) | dict(variables)


def refused(error: Exception) -> RequestError:
    """What a template raised, as the fault of the messages."""
    message = f"messages: the model's chat template refused them: {str(error)[:160]}"
    return RequestError("messages", None, code="chat_template_error", message=message)


def missing() -> RequestError:
    allowed = "completions only: this model has no chat template"
    return RequestError("messages", "a chat", allowed, code="chat_template_missing")


def until_final(prompt: str, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt cut off after the text of the last message, so that the model goes on with it.

    Raises:
        RequestError: the template does not write that text.
    """
    final = str(messages[-1].get("content") or "").strip()
    at = prompt.rfind(final) if final else -1
    if at < 0:
        limit = "a last message whose text the template shows"
        raise RequestError("continue_final_message", True, limit, code="conflict")
    return prompt[: at + len(final)]


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def compiled(source: str) -> Template:
    """Raises jinja2.TemplateError where it is no template."""
    return environment().from_string(source)
