"""The command line: text becomes a config, and the library is called."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

import servekit
from common_platform.errors import PlatformError, RequestError, exit_code, shown
from servekit.engine.config import EngineConfig
from servekit.server.limits import ServerLimits, flag_of

Command = TypeVar("Command", bound=Callable[..., Any])
ENGINE = {
    "dtype": "Weights and KV cache: auto, float32, bfloat16, float16.",
    "num_threads": "Threads of the matrix products; 0: as many as torch likes.",
    "max_model_len": "Tokens of one sequence; default: what the model was made for.",
    "block_size": "Tokens per KV block: 8, 16, 32 or 64.",
    "kv_cache_memory_bytes": "Memory of the KV cache; default: 40 % of what is free, at most 4 GiB.",
    "max_num_seqs": "Sequences in one step.",
    "max_num_batched_tokens": "Tokens in one step.",
    "long_prefill_token_threshold": "Longest prefill chunk of one request in a step; 0: the whole step.",
    "scheduling_policy": "fcfs, priority or fair.",
}
TYPES: dict[str, Any] = {"dtype": str, "scheduling_policy": str}


def engine_options(command: Command) -> Command:
    """One flag for each field of EngineConfig that is a number or a word."""
    command = click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt anew.")(command)
    for name, text in reversed(ENGINE.items()):
        kind = TYPES.get(name, int)
        default = EngineConfig(model="").__getattribute__(name)
        option = click.option(flag_of(name), type=kind, default=default, show_default=default is not None, help=text)
        command = option(command)
    return command


def limit_options(command: Command) -> Command:
    for field in reversed(fields(ServerLimits)):
        kind = type(field.default)
        command = click.option(flag_of(field.name), type=kind, default=field.default, show_default=True)(command)
    return command


def engine_config(model: str, options: dict[str, Any]) -> EngineConfig:
    chosen = {name: options[name] for name in ENGINE}
    return EngineConfig(model=model, enable_prefix_caching=not options["no_prefix_caching"], **chosen)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(servekit.__version__, prog_name="servekit")
def cli() -> None:
    """Serve large language models."""


@cli.command()
@click.argument("model", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="0: a free port.")
@click.option("--api-key", "api_keys", multiple=True, help="A key that callers must send; may be repeated.")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Keys, one a line.")
@click.option("--served-model-name", help="The name that requests use; default: the folder's.")
@click.option("--shutdown-timeout-s", type=float, default=30.0, show_default=True, help="For running requests to end.")
@click.option("--allow-insecure-bind", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--ignore-unknown-fields", is_flag=True, help="Do not refuse fields that nobody here knows.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@engine_options
@limit_options
def serve(model: str, api_key_file: Path | None, log_level: str, **options: Any) -> None:
    """Serve MODEL, a checkpoint folder, over an OpenAI-compatible API until interrupted."""
    from servekit.server.auth import keys_from
    from servekit.server.run import ServerConfig
    from servekit.server.run import serve as run

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    names = ("host", "port", "served_model_name", "shutdown_timeout_s", "allow_insecure_bind", "ignore_unknown_fields")
    server = ServerConfig(
        api_keys=keys_from(options["api_keys"], api_key_file, os.environ.get("SERVEKIT_API_KEY")),
        limits=ServerLimits(**{field.name: options[field.name] for field in fields(ServerLimits)}),
        **{name: options[name] for name in names},
    )
    sys.exit(run(engine_config(model, options), server))


@cli.command()
@click.argument("model", type=click.Path())
@click.argument("prompt")
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--chat", is_flag=True, help="Put PROMPT through the model's chat template.")
@engine_options
def generate(model: str, prompt: str, max_tokens: int, temperature: float, chat: bool, **options: Any) -> None:
    """Answer PROMPT once and print the answer."""
    from servekit.llm import LLM
    from servekit.sampling.parameters import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    config = engine_config(model, options)
    with LLM(**{name: getattr(config, name) for name in config.__struct_fields__}) as llm:
        asked = llm.chat([{"role": "user", "content": prompt}], params) if chat else llm.generate(prompt, params)
    click.echo(asked[0].outputs[0].text)


@cli.command()
def info() -> None:
    """The device that servekit would use, and its kernels."""
    import torch

    click.echo(f"servekit {servekit.__version__}, torch {torch.__version__}")
    click.echo(f"threads: {torch.get_num_threads()}")
    click.echo("kernels: reference (torch)")


def main() -> None:
    """Exit with the status that the error stands for; its one line goes to stderr."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except PlatformError as error:
        prefix = "" if error.param or isinstance(error, RequestError) else f"{type(error).__name__}: "
        click.echo(f"error: {prefix}{error}", err=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        click.echo(f"error: {shown(str(error))}", err=True)
        sys.exit(5)


if __name__ == "__main__":
    main()
