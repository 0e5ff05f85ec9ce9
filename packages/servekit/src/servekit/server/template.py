"""Which variables a model's chat template reads: the only ones a caller may set."""

from __future__ import annotations

from pathlib import Path

from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common_platform.artifact import open_model_folder


def template_variables(model: str | Path) -> frozenset[str]:
    """Names that the template takes from outside; none where the model has no template."""
    with open_model_folder(model, verify=False) as folder:
        settings = folder.read_json("tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
        source = settings.get("chat_template")
        if folder.has("chat_template.jinja"):
            source = folder.read_bytes("chat_template.jinja").decode("utf-8")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not isinstance(source, str):
        return frozenset()
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    ours = {"raise_exception", "strftime_now"} | {name for name in settings if name.endswith("_token")}
    return frozenset(meta.find_undeclared_variables(environment.parse(source)) - ours)
