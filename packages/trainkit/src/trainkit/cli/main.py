"""``trainkit``: fit, validate, test, predict, resume, export, plot, info."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common_platform.errors import (
    CheckpointIncomplete,
    ConfigError,
    DistError,
    PlatformError,
    TrainingError,
    exit_code,
)

TOPICS = ("resume", "export", "plot", "info")
DESCRIPTION = """Train, evaluate and predict. Beside the commands below there are:
resume (go on from a checkpoint), export (ONNX, TorchScript), plot (a run's curves) and info (this machine)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status says how it went (0 done, 2 usage, 3 settings, 4 checkpoint, 5 environment, 6
    ranks, 7 training, 130 interrupted, 143 terminated)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # class paths name modules of the folder that one stands in
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        if given and given[0] in TOPICS:
            _topic(given[0], given[1:])
        else:
            _train(given)
    except KeyboardInterrupt:
        return 130
    except PlatformError as error:
        if debug or isinstance(error, TrainingError):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return _status_of(error)
    return 0


def run() -> None:
    sys.exit(main())


def _status_of(error: PlatformError) -> int:
    if not isinstance(error, DistError):
        return exit_code(error)
    from trainkit.strategies.launch import status_of  # a rank's own error counts before those that it has caused

    return status_of(error)


def _train(arguments: Sequence[str]) -> Any:
    from trainkit.cli.train_cli import TrainCLI

    return TrainCLI(args=arguments, parser_kwargs={"prog": "trainkit", "description": DESCRIPTION})


def _topic(name: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"trainkit {name}", description=TOPIC[name].__doc__)
    if name == "info":
        parser.add_argument("--json", action="store_true", help="one JSON object")
    elif name == "plot":
        parser.add_argument("run", type=Path, help="the folder of a run: metrics.csv is in it, or below it")
        parser.add_argument("--out", type=Path, help="a .png, .svg or .html file; default: curves.png in the run")
    else:
        parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or the folder of several")
        parser.add_argument("--config", type=Path, help="default: the config.yaml beside the checkpoint")
    if name == "export":
        parser.add_argument("--format", choices=("onnx", "torchscript"), default="onnx")
        parser.add_argument("--out", type=Path, required=True, help="the file to write")
        parser.add_argument("--overwrite", action="store_true", help="replace what stands at --out")
    TOPIC[name](parser.parse_args(list(arguments)))


def show_info(args: argparse.Namespace) -> None:
    """What this machine can train with."""
    from trainkit.cli.info import info

    print(info(as_json=args.json))


def plot(args: argparse.Namespace) -> None:
    """Draw a run's loss, learning rate and throughput."""
    from trainkit.plot_run import plot_run

    print(plot_run(args.run, args.out))


def resume(args: argparse.Namespace) -> None:
    """Go on from a checkpoint with the settings of its run."""
    found = _checkpoint(args.checkpoint)
    config = args.config or _config_beside(found)
    _train(["fit", "--config", str(config), "--ckpt_path", str(found)])


def export(args: argparse.Namespace) -> None:
    """Write the module of a checkpoint in another format, compared with the module itself."""
    if args.out.exists() and not args.overwrite and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError("--out", str(args.out), "a path where nothing stands", flag="--overwrite")
    from trainkit import checkpoint
    from trainkit.cli.train_cli import TrainCLI

    found = _checkpoint(args.checkpoint)
    state = checkpoint.load_any(found)
    config = args.config or _config_beside(found)

    class Parts(TrainCLI):
        """Makes the parts of the run and leaves it at that."""

        def _run_subcommand(self, subcommand: str) -> None: ...

    cli = Parts(args=["fit", "--config", str(config)], save_config_callback=None)
    checkpoint.load_weights(cli.model, state["state_dict"], strict=cli.model.strict_loading)
    cli.model.eval()
    write = cli.model.to_onnx if args.format == "onnx" else cli.model.to_torchscript
    write(args.out)
    print(args.out)


TOPIC = {"info": show_info, "plot": plot, "resume": resume, "export": export}


def _checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest complete one in it.

    Raises:
        CheckpointError: there is none; what is missing is named.
    """
    from trainkit import checkpoint
    from trainkit.checkpoint.folder import manifest_of

    if path.is_file():
        return path
    newest = None if (path / "manifest.json").exists() else checkpoint.find_last(path)
    if newest is not None:
        return newest
    if not (path / "manifest.json").exists():
        raise CheckpointIncomplete("--checkpoint", path.name, "a folder with a complete checkpoint: no manifest.json")
    manifest_of(path)
    return path


def _config_beside(path: Path) -> Path:
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ConfigError("--config", None, f"the settings of the run: there is no config.yaml beside {path.name}")
