"""YAML files of settings, read strictly before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common_platform.errors import ConfigError, ResourceError

MAX_BYTES = 1 << 20
MAX_ALIASES = 64


def check_config_files(arguments: Sequence[str]) -> list[str]:
    """Read every file that ``--config`` names in ``arguments``.

    Returns:
        Their texts.

    Raises:
        ConfigError: one is missing, too large, has a key twice, a tag that would make an object, or is no mapping.
    """
    found = []
    for name, value in _named(arguments):
        is_text = value.lstrip().startswith(("{", "[")) or "\n" in value
        found.append(value if is_text else _text(Path(value), name))
        read_yaml(found[-1], name)
    return found


def refuse_quoted_numbers(text: str, config: Any) -> None:
    """A number in quotes is a text, and not a setting that wants a number.

    Args:
        text: of a file that ``check_config_files`` has read.
        config: what was made of it.

    Raises:
        ConfigError: a quoted text became a number; the key is named.
    """
    yaml = _yaml()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        _refuse_quoted(yaml, root, config, "")


def _refuse_quoted(yaml: Any, node: Any, made: Any, key: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = made.get(name.value) if hasattr(made, "get") else None
            _refuse_quoted(yaml, value, inner, f"{key}.{name.value}".lstrip("."))
        return
    is_quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    if is_quoted and isinstance(made, int | float) and not isinstance(made, bool):
        raise ConfigError(key, f"the text {node.value!r}", f"a number: {node.value} without quotes")


def _named(arguments: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            found.append((flag, value))
        elif place + 1 < len(arguments):
            found.append((flag, arguments[place + 1]))
    return found


def _text(path: Path, flag: str) -> str:
    if not path.is_file():
        raise ConfigError(flag, str(path), "a YAML file that is there")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(flag, f"{path.name} of {path.stat().st_size} bytes", f"{MAX_BYTES} bytes at the most")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(flag, path.name, "UTF-8 text") from error


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """A mapping of plain values.

    Raises:
        ConfigError: it is anything else; see ``check_config_files``.
    """
    yaml = _yaml()
    try:
        _check_events(yaml, text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check_keys(yaml, node, name)
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ConfigError(name, f"line {line}: {getattr(error, 'problem', error)}", "valid YAML") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(name, type(found).__name__, "a mapping of names to values")
    return found


def _check_events(yaml: Any, text: str, name: str) -> None:
    """Aliases can make a small file a huge value, and tags an object; both show before anything is built."""
    aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        if aliases > MAX_ALIASES:
            raise ConfigError(name, f"more than {MAX_ALIASES} aliases", f"{MAX_ALIASES} aliases at the most")
        tag = getattr(event, "tag", None)
        if (tag is not None and not tag.startswith("tag:yaml.org,2002:")) or (tag and "python" in tag):
            raise ConfigError(name, f"the tag {tag}", "plain values: nothing in a config file is executed")


def _check_keys(yaml: Any, node: Any, name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen and key.value != "<<":
                raise ConfigError(f"{name}: {key.value}", f"twice, again in line {key.start_mark.line + 1}", "once")
            seen.add(key.value)
            _check_keys(yaml, value, f"{name}: {key.value}")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(yaml, value, name)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ResourceError("command line", "PyYAML is not installed", "pip install 'trainkit[cli]'") from error
    return yaml
