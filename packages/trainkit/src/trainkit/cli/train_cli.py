"""``LightningCLI``: a script whose modules, data and Trainer are configured from the command line and YAML files."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError, PlatformError, ResourceError
from trainkit.callbacks.base import Callback
from trainkit.cli.config_file import check_config_files, refuse_quoted_numbers
from trainkit.cli.save_config import SaveConfigCallback
from trainkit.data.module import DataModule
from trainkit.data.seed import seed_everything
from trainkit.module import TrainModule
from trainkit.trainer import Trainer

if TYPE_CHECKING:
    from trainkit.cli.parser import LightningArgumentParser

SUBCOMMANDS = {  # name -> arguments of the Trainer's method that are made elsewhere
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
    "predict": {"model", "dataloaders", "datamodule"},
}
USAGE, REFUSED = 2, 3  # exit status: a wrong command line; wrong settings


class TrainCLI:
    """Parses, makes the parts and runs, all in the constructor; ``fit --help`` says what can be set.

    Args:
        model_class: the module, or a function that makes one; None: any, chosen by ``--model``.
        datamodule_class: the data module, or a function that makes one; None: any, by ``--data``, where one is given.
        save_config_callback: keeps the configuration beside the run; None: nothing does.
        trainer_class, trainer_defaults: the Trainer, and settings to start from; callbacks in the latter are added.
        seed_everything_default: True: a fixed seed; False: none; or the seed.
        parser_kwargs: of the parser; or of each subcommand's, by its name.
        subclass_mode_model, subclass_mode_data: let the user choose a subclass.
        args: the command line, or a dictionary of settings; default: the process's.
        run: False: only make the parts, which are ``model``, ``datamodule`` and ``trainer``.
        auto_configure_optimizers: let ``--optimizer`` and ``--lr_scheduler`` take the place of
            ``configure_optimizers``.

    Raises:
        SystemExit: 2 for a wrong command line, 3 for wrong settings; the key is named on stderr.
        ResourceError: jsonargparse is not installed.
    """

    def __init__(
        self,
        model_class: type[TrainModule] | Callable[..., TrainModule] | None = None,
        datamodule_class: type[DataModule] | Callable[..., DataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: Mapping[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: Mapping[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: Mapping[str, Any] | None = None,
        parser_class: type[LightningArgumentParser] | None = None,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: Sequence[str] | Mapping[str, Any] | None = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
    ) -> None:
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = dict(save_config_kwargs or {})
        self.trainer_class, self.trainer_defaults = trainer_class, dict(trainer_defaults or {})
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs = dict(parser_kwargs or {})
        self.parser_class = parser_class or _parser_class()
        self.auto_configure_optimizers = auto_configure_optimizers
        self.model_class, self.datamodule_class = model_class or TrainModule, datamodule_class or DataModule
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self._needs_data = datamodule_class is not None
        self._parsers: dict[str, LightningArgumentParser] = {}
        self.subcommand: str | None = None
        self.setup_parser(run)
        self.parse_arguments(self.parser, args)
        self.subcommand = self.config["subcommand"] if run else None
        self._set_seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # --- the parser ---

    def setup_parser(self, add_subcommands: bool) -> None:
        own = {name: kwargs for name, kwargs in self.parser_kwargs.items() if name in self.subcommands()}
        shared = {name: value for name, value in self.parser_kwargs.items() if name not in own}
        self.parser = self.parser_class(**shared)
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        commands = self.parser.add_subcommands()
        for name, left_out in self.subcommands().items():
            part = self.parser_class(**(shared | own.get(name, {})))
            self._add_arguments(part)
            method = getattr(self.trainer_class if isinstance(self.trainer_class, type) else Trainer, name)
            about = (inspect.getdoc(method) or name).splitlines()[0]
            part.add_method_arguments(
                self.trainer_class if isinstance(self.trainer_class, type) else Trainer, name, skip=set(left_out)
            )
            self._parsers[name] = part
            commands.add_subcommand(name, part, help=about)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The names of the Trainer's methods that can be run, and which of their arguments are not asked for."""
        return {name: set(left_out) for name, left_out in SUBCOMMANDS.items()}

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        default = self.seed_everything_default
        parser.add_argument(
            "--seed_everything", type=bool | int, default=default, help="a seed; true: one that is chosen; false: none"
        )
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{name}": v for name, v in self.trainer_defaults.items() if name != "callbacks"}
        parser.add_lightning_class_args(self.model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(
            self.datamodule_class, "data", subclass_mode=self.subclass_mode_data, required=self._needs_data
        )
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser.optimizers:
                parser.add_optimizer_args()
            if not parser.lr_schedulers:
                parser.add_lr_scheduler_args()
        from trainkit.cli.parser import instantiator

        for key, place in (parser.optimizers | parser.lr_schedulers).items():
            if place != "AUTOMATIC":
                parser.link_arguments(key, place, compute_fn=instantiator)
        if defaults:
            parser.set_defaults(defaults)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """For subclasses: more arguments, links between them, other defaults."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | Mapping[str, Any] | None) -> None:
        from jsonargparse import ArgumentError

        from trainkit.cli.parser import blames_flag, sentence_of

        given = sys.argv[1:] if args is None else args
        try:
            if isinstance(given, Mapping):
                self.config = parser.parse_object(dict(given))
            else:
                texts = check_config_files(given)
                self.config = parser.parse_args(list(given))
                command = self.config.get("subcommand")
                for text in texts:
                    refuse_quoted_numbers(text, self.config[command] if command else self.config)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(REFUSED) from error
        except ArgumentError as error:
            print(f"error: {sentence_of(error, parser)}", file=sys.stderr)
            is_usage = not isinstance(given, Mapping) and (blames_flag(error, given) or not _has_config(given))
            raise SystemExit(USAGE if is_usage else REFUSED) from error

    # --- the parts ---

    def before_instantiate_classes(self) -> None:
        """For subclasses: ``self.config`` is there and nothing has been made of it."""

    def instantiate_classes(self) -> None:
        from trainkit.cli.parser import message_of

        try:
            self.config_init = self.parser.instantiate(self.config)
        except PlatformError:
            raise
        except (ValueError, TypeError) as error:  # jsonargparse tells of ours by its own
            ours = _cause_of(error)
            if ours is not None:
                raise ours from error
            raise ConfigError("config", message_of(error), "settings of which the classes can be made") from error
        self.model: TrainModule = self._get(self.config_init, "model")
        self.datamodule: DataModule | None = self._get(self.config_init, "data")
        self._add_configure_optimizers()
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with the callbacks of the configuration, of ``trainer_defaults``, and the one that keeps it."""
        settings = dict(self._get(self.config_init, "trainer", default={})) | kwargs
        given = settings.get("callbacks")
        callbacks = [given] if isinstance(given, Callback) else list(given or [])
        callbacks += [self._get(self.config_init, key) for key in self._command_parser.callback_keys]
        extra = self.trainer_defaults.get("callbacks", [])
        callbacks += [extra] if isinstance(extra, Callback) else list(extra)
        if self.save_config_callback is not None:
            config = self.config if self.subcommand is None else self.config[self.subcommand]
            callbacks.append(self.save_config_callback(self._command_parser, config, **self.save_config_kwargs))
        return self.trainer_class(**(settings | {"callbacks": callbacks}))

    def configure_optimizers(self, lightning_module: TrainModule, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """What the model's ``configure_optimizers`` returns where ``--optimizer`` is given."""
        if lr_scheduler is None:
            return optimizer
        return [optimizer], [lr_scheduler]

    def _add_configure_optimizers(self) -> None:
        from trainkit.cli.parser import instantiate_class

        parser = self._command_parser
        chosen = [self._get(self.config_init, key) for key, to in parser.optimizers.items() if to == "AUTOMATIC"]
        schedule = [self._get(self.config_init, key) for key, to in parser.lr_schedulers.items() if to == "AUTOMATIC"]
        optimizer = chosen[0] if chosen else None
        if optimizer is None:
            if schedule and schedule[0] is not None:
                raise ConfigError("lr_scheduler", "without an optimizer", "beside --optimizer")
            return
        one = _with_class_path(optimizer, parser, "optimizer")
        other = None if not schedule or schedule[0] is None else _with_class_path(schedule[0], parser, "lr_scheduler")

        def configure_optimizers(module: TrainModule) -> Any:
            made = instantiate_class(([p for p in module.parameters() if p.requires_grad],), one)
            return self.configure_optimizers(module, made, None if other is None else instantiate_class(made, other))

        self.model.configure_optimizers = types.MethodType(configure_optimizers, self.model)  # type: ignore[method-assign]

    @property
    def _command_parser(self) -> LightningArgumentParser:
        return self.parser if self.subcommand is None else self._parsers[self.subcommand]

    def _get(self, config: Any, key: str, default: Any = None) -> Any:
        found = config.get(key if self.subcommand is None else f"{self.subcommand}.{key}", default)
        return default if found is None else found

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is None or seed is False:
            return
        chosen = seed_everything(workers=True) if seed is True else seed_everything(seed, workers=True)
        where = self.config if self.subcommand is None else self.config[self.subcommand]
        where["seed_everything"] = chosen

    # --- the run ---

    def _run_subcommand(self, subcommand: str) -> None:
        before = getattr(self, f"before_{subcommand}", None)
        if callable(before):
            before()
        skip = self.subcommands()[subcommand]
        settings = {
            name: self._get(self.config_init, name)
            for name in inspect.signature(getattr(self.trainer, subcommand)).parameters
            if name not in skip and self._get(self.config_init, name) is not None
        }
        getattr(self.trainer, subcommand)(model=self.model, datamodule=self.datamodule, **settings)
        after = getattr(self, f"after_{subcommand}", None)
        if callable(after):
            after()


LightningCLI = TrainCLI


def _parser_class() -> type[LightningArgumentParser]:
    try:
        from trainkit.cli.parser import LightningArgumentParser as Parser
    except ModuleNotFoundError as error:
        if error.name != "jsonargparse":
            raise
        raise ResourceError("command line", "jsonargparse is not installed", "pip install 'trainkit[cli]'") from error
    return Parser


def _cause_of(error: BaseException) -> PlatformError | None:
    """The error of ours that ``error`` was raised for."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        if isinstance(one, PlatformError):
            return one
        seen.append(one)
        waiting += [one.__cause__, one.__context__, *(a for a in one.args if isinstance(a, BaseException))]
    return None


def _has_config(arguments: Sequence[str]) -> bool:
    return any(argument.partition("=")[0] in ("--config", "-c") for argument in arguments)


def _with_class_path(chosen: Any, parser: Any, key: str) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of a part; a group of one class's arguments lacks the former."""
    plain = chosen.as_dict() if hasattr(chosen, "as_dict") else dict(chosen)
    if "class_path" in plain:
        return plain
    kind = next(group for group in parser.groups.values() if group.dest == key).group_class
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": plain}
