"""A parser whose arguments come from the type hints of modules, data modules, callbacks and the Trainer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jsonargparse
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from common_platform.errors import ConfigError, shown
from trainkit.callbacks.base import Callback
from trainkit.trainer import Trainer

Classes = type | tuple[type, ...]


class LightningArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with ``--config`` and groups of a class's arguments."""

    def __init__(self, *args: Any, description: str = "Train, evaluate and predict.", **kwargs: Any) -> None:
        super().__init__(*args, description=description, **({"exit_on_error": False} | kwargs))
        self.add_argument("-c", "--config", action="config", help="a YAML file of settings; several add up")
        self.callback_keys: list[str] = []
        self.optimizers: dict[str, str] = {}  # key -> where it goes: "automatic" or an argument of the model
        self.lr_schedulers: dict[str, str] = {}

    def add_lightning_class_args(
        self,
        lightning_class: type | Callable[..., Any],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """The arguments of a class below ``nested_key``; in subclass mode the class is chosen by ``class_path``."""
        is_class = isinstance(lightning_class, type)
        if is_class and issubclass(lightning_class, Callback):  # type: ignore[arg-type]
            self.callback_keys.append(nested_key)
        if subclass_mode:
            kind: Any = lightning_class
            self.add_subclass_arguments(kind, nested_key, fail_untyped=False, required=required)
            return [nested_key]
        made_later = is_class and issubclass(lightning_class, Trainer)  # type: ignore[arg-type]
        return list(
            self.add_class_arguments(
                lightning_class,  # type: ignore[arg-type]
                nested_key,
                fail_untyped=False,
                instantiate=not made_later,
                sub_configs=True,
            )
        )

    def add_optimizer_args(
        self, optimizer_class: Classes = Optimizer, nested_key: str = "optimizer", link_to: str = "AUTOMATIC"
    ) -> None:
        """Let the user choose an optimizer; the model is given it as ``configure_optimizers``, or as ``link_to``."""
        self._add_parts(optimizer_class, nested_key, {"params"})
        self.optimizers[nested_key] = link_to

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Classes = (LRScheduler, ReduceLROnPlateau),
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Let the user choose a schedule; see ``add_optimizer_args``."""
        self._add_parts(lr_scheduler_class, nested_key, {"optimizer"})
        self.lr_schedulers[nested_key] = link_to

    def _add_parts(self, kinds: Classes, nested_key: str, skip: set[str]) -> None:
        how: dict[str, Any] = {"fail_untyped": False, "skip": skip, "instantiate": False}
        if isinstance(kinds, tuple) or kinds in (Optimizer, LRScheduler):  # chosen by class_path
            self.add_subclass_arguments(kinds, nested_key, required=False, **how)
        else:
            self.add_class_arguments(kinds, nested_key, sub_configs=True, **how)


def instantiate_class(args: Any | tuple[Any, ...], init: dict[str, Any]) -> Any:
    """Make the object of ``{"class_path": ..., "init_args": {...}}`` with ``args`` in front.

    Raises:
        ConfigError: there is no such class.
    """
    module, _, name = str(init["class_path"]).rpartition(".")
    try:
        found = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("class_path", init["class_path"], "a class that can be imported") from error
    front = args if isinstance(args, tuple) else (args,)
    return found(*front, **dict(init.get("init_args") or {}))


def message_of(error: Exception) -> str:
    """jsonargparse's message in one line."""
    return " ".join(str(error).split())


VALUE = re.compile(r'Parser key "([^"]+)":.*?(?:Given value|Got value): (\S+)')
WANTED = re.compile(r"Expected an? <class '([^']+)'>")
UNKNOWN = re.compile(r"does not accept (?:option|nested key) '([^']+)'|unrecognized arguments: --([\w.]+)")


def sentence_of(error: Exception, parser: jsonargparse.ArgumentParser) -> str:
    """What is wrong in the words of our own errors: the key, the value, and what is allowed."""
    text = message_of(error)
    unknown = UNKNOWN.search(text)
    if unknown:
        key = unknown[1] or unknown[2]
        near = difflib.get_close_matches(key, _keys(parser), 1)
        return f"{key}: unknown{f'; did you mean {near[0]}?' if near else ''}"
    value, wanted = VALUE.search(text), WANTED.findall(text)
    if value and wanted and "class_path" not in text:
        return f"{value[1]}: got {shown(value[2])}; allowed {' or '.join(dict.fromkeys(wanted))}"
    return text


def _keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    found = []
    for action in parser._actions:
        for part in getattr(action, "_name_parser_map", {}).values():
            found += _keys(part)
        found.append(action.dest)
    return found


def instantiator(config: Any) -> Any:
    """What a model is given to make an optimizer or a schedule with: ``instantiator(parameters)``."""
    return lambda *args: instantiate_class(args, config.as_dict() if hasattr(config, "as_dict") else dict(config))


def blames_flag(error: Exception, arguments: Sequence[str]) -> bool:
    """Whether what is wrong stands on the command line, not in a file."""
    text = str(error)
    flags = [a.partition("=")[0].lstrip("-") for a in arguments if a.startswith("-") and len(a) > 1]
    return any(flag and flag not in ("config", "c") and flag in text for flag in flags)
