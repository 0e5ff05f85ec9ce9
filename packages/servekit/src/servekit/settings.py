"""Settings of a command from a file and from the environment; what the command line says goes before both."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from common_platform.errors import ConfigError

PREFIX = "SERVEKIT_"
MAX_FILE_BYTES = 1 << 20
OWN_VARIABLES = ("api_key", "config")  # taken out of the environment by the command itself, or not there at all


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain YAML: no aliases, which can grow without bound, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("config", "an alias (*name)", "values written out", flag="--config")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(str(key.value), "the key twice", "once", flag="--config", code="duplicate_key")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def defaults_of(command: click.Command, path: Path | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """What stands in for flags that are not given: the file's values, and before them the environment's.

    Raises:
        ConfigError: a file that cannot be read, a key that is not known, a value of another type.
    """
    found = {} if path is None else _from_file(path, _options(command))
    for name, option in _options(command).items():
        text = environment.get(PREFIX + name.upper())
        if text is not None and name not in OWN_VARIABLES:
            found[name] = _from_text(PREFIX + name.upper(), text, option)
    return found


def _options(command: click.Command) -> dict[str, click.Option]:
    return {option.name: option for option in command.params if isinstance(option, click.Option) and option.name}


def _from_file(path: Path, options: Mapping[str, click.Option]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError("config", path.name, "a readable YAML file", flag="--config") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError("config", f"more than {MAX_FILE_BYTES} bytes", f"{MAX_FILE_BYTES} bytes", flag="--config")
    try:
        values = yaml.load(data, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError("config", message=f"config: not plain YAML: {what}"[:300]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("config", type(values).__name__, "key: value, one a line", flag="--config")
    return dict(_checked(key, value, options) for key, value in values.items())


def _checked(key: Any, value: Any, options: Mapping[str, click.Option]) -> tuple[str, Any]:
    name = str(key).replace("-", "_")
    option = options.get(name)
    if option is None or name == "config":
        near = difflib.get_close_matches(name, options, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(str(key), "an unknown key", f"the names of flags{meant}", flag="--config")
    wanted = _kind_of(option)
    if option.multiple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(str(key), f"{type(value).__name__} {value!r}", "a list of strings", flag="--config")
        return name, value
    if value is None:
        return name, None
    fits = isinstance(value, wanted) and not (isinstance(value, bool) and bool not in wanted)
    if not fits:
        names = {bool: "boolean", int: "integer", float: "number", str: "string"}
        got = names.get(type(value), type(value).__name__)
        raise ConfigError(str(key), f"{got} {value!r}", names[wanted[0]], flag="--config")
    return name, value


def _kind_of(option: click.Option) -> tuple[type, ...]:
    if option.is_flag:
        return (bool,)
    if isinstance(option.type, click.types.FloatParamType):
        return (float, int)
    return (int,) if isinstance(option.type, click.types.IntParamType) else (str,)


def _from_text(variable: str, text: str, option: click.Option) -> Any:
    if option.multiple:
        return text.split(",")
    try:
        return option.type.convert(text, option, None)
    except click.BadParameter as error:
        limit = error.message.replace(repr(text), "it").removesuffix(".")
        raise ConfigError(variable, text, f"another value: {limit}", flag=variable) from error


def add_file_option(command: click.Command) -> None:
    """Give ``command``, where it has flags, and all commands below it the flag ``--config``, and variables with it."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            add_file_option(inner)
    if _options(command):
        told = "YAML file with flags as keys. Each flag is also a variable: --max-n is SERVEKIT_MAX_N."
        kind = click.Path(path_type=Path)
        file = click.Option(["--config"], type=kind, is_eager=True, expose_value=False, callback=_use, help=told)
        command.params.append(file)


def _use(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Called before all other flags are read."""
    context.default_map = defaults_of(context.command, path, os.environ)
