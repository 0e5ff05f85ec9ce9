"""The command line: text to settings, settings to the library."""

from __future__ import annotations

import logging
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from common_platform.errors import PlatformError, exit_code
from common_platform.logging import configure
from servekit import __version__, settings
from servekit.bench.command import make_bench
from servekit.engine.config import EngineConfig
from servekit.flags import (
    KEY_VARIABLE,
    budget_options,
    engine_options,
    first_key,
    limit_options,
    server_config,
    server_options,
    talk_options,
)
from servekit.sampling.parameters import SamplingParams
from servekit.server.config import ServerConfig

USAGE = 2
NOT_BACKENDS = (
    "experts",
    "flashinfer_adapter",
    "metadata",
    "native_experts",
    "library",
    "libservekit_cpu",
    "packing",
    "program",
    "memory",
    "alignment",
    "conversion",
    "rule",
    "shared",
    "tiles",
    "weights",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="servekit")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def cli(debug: bool) -> None:
    """Serve a language model, or run one here. Each flag of a command is also a variable: --seed is SERVEKIT_SEED."""


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@server_options
@budget_options
@engine_options
@limit_options
def serve(model: Path, log_level: str, **flags: Any) -> int:
    """Serve MODEL, a model folder, over HTTP until interrupted."""
    config = server_config(model, flags)
    engine_config = EngineConfig(model=str(model), grammar_limits=config.limits.grammar(), **flags)
    _configure_logs(log_level)
    from servekit.server.run import serve as run_server

    return run_server(engine_config, config)


def _configure_logs(level: str) -> None:
    """Our own lines on stderr; the access log is JSON, one object a line."""
    configure(level)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("servekit.access")
    access.handlers, access.propagate = [handler], False


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", default=64, show_default=True)
@talk_options
@click.option("--chat", is_flag=True, help="Put PROMPT through the model's chat template.")
@engine_options
def complete(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    api_key_file: Path | None,
    chat: bool,
    **settings: Any,
) -> int:
    """Continue PROMPT and print the answer as it comes. MODEL: a model folder, or the URL of a running server."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    from servekit.talk import speaker

    with speaker(model, settings, first_key(api_key_file)) as speaks:
        pieces = speaks.chat([{"role": "user", "content": prompt}], params) if chat else speaks.complete(prompt, params)
        _print_pieces(pieces)
    return 0


@cli.command(name="chat")
@click.argument("model")
@click.option("--system", default=None, help="What the model is told first.")
@click.option("--max-tokens", default=256, show_default=True)
@talk_options
@engine_options
def talk(
    model: str,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    api_key_file: Path | None,
    **settings: Any,
) -> int:
    """Talk until the input ends: a line in, an answer out. MODEL: a model folder, or the URL of a running server."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    from servekit.talk import speaker

    with speaker(model, settings, first_key(api_key_file)) as speaks:
        for line in _lines():
            messages.append({"role": "user", "content": line})
            answer = _print_pieces(speaks.chat(messages, params))
            messages.append({"role": "assistant", "content": answer})
    return 0


def _lines() -> Iterator[str]:
    """What is typed, without blank lines; who types at a terminal sees a mark."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        click.echo(mark, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _print_pieces(pieces: Iterator[str]) -> str:
    said = []
    for piece in pieces:
        said.append(piece)
        click.echo(piece, nl=False)
    click.echo()
    return "".join(said)


def _load(model: Path, settings: dict[str, Any]) -> Any:
    from servekit.llm import LLM

    return LLM(model, **settings)


@cli.group(invoke_without_command=True)
@click.option("--cost", metavar="FILE|JSON", help="Seconds of a step: what `servekit simulate fit` wrote. Needed.")
@click.option("--trace", type=click.Path(path_type=Path), help="Requests, JSON lines; unset: drawn as told below.")
@click.option("--num-requests", default=1000, show_default=True, help="Requests, or sessions of --num-turns.")
@click.option("--request-rate", default=10.0, show_default=True, help="Requests a second; inf: all at once.")
@click.option("--arrivals", default="poisson", show_default=True, help="poisson, constant or burst.")
@click.option("--burst-size", default=10, show_default=True, help="Requests that come together.")
@click.option(
    "--prompt-tokens", default="fixed:200", show_default=True, help="fixed:N, uniform:LOW:HIGH, lognormal:..."
)
@click.option("--output-tokens", default="fixed:200", show_default=True, help="lognormal:MEDIAN:SIGMA or trace:FILE.")
@click.option("--num-prefix-groups", default=0, show_default=True, help="Prompts begin with the prefix of one of them.")
@click.option("--prefix-tokens", default=0, show_default=True, help="Length of that prefix.")
@click.option("--num-turns", default=1, show_default=True, help="Turns of a session.")
@click.option("--think-s", default=1.0, show_default=True, help="Mean seconds between an answer and the next turn.")
@click.option("--num-tenants", default=1, show_default=True, help="Tenants, for the fair policy.")
@click.option("--num-priorities", default=1, show_default=True, help="Priorities, for the priority policy.")
@click.option("--seed", default=0, show_default=True)
@click.option("--num-replicas", default=1, show_default=True, help="Engines that are all alike.")
@click.option("--router", default="round_robin", show_default=True, help="round_robin, least_loaded or prefix_aware.")
@click.option("--num-blocks", default=4096, show_default=True, help="KV blocks of a replica.")
@click.option("--block-size", default=16, show_default=True, help="Tokens per KV block.")
@click.option("--enable-prefix-caching/--no-prefix-caching", default=True, show_default=True)
@click.option("--max-num-seqs", default=64, show_default=True, help="Sequences computed together.")
@click.option("--max-num-batched-tokens", default=2048, show_default=True, help="Tokens a step computes at the most.")
@click.option("--max-model-len", default=2048, show_default=True, help="Longest context in tokens.")
@click.option(
    "--long-prefill-token-threshold", default=0, show_default=True, help="Longest prefill chunk; 0: no bound."
)
@click.option("--scheduling-policy", default="fcfs", show_default=True, help="fcfs, priority or fair.")
@click.option("--step-by-step", is_flag=True, help="Visit every row in every step: the same answers, later.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures there, and no table.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Draw curves there, by its ending: .png, .svg"
)
@click.pass_context
def simulate(context: click.Context, /, **settings: Any) -> int:
    """Try a workload on the real scheduler in virtual time: what would N replicas do with it?"""
    if context.invoked_subcommand is not None:
        return 0
    from servekit.simulate.command import run

    run(**settings)
    return 0


@simulate.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The profile: JSON lines, one a step.")
@click.option("--grid-rows", default="1,2,4,8,16,32,64", show_default=True, help="Numbers of sequences to try.")
@click.option("--grid-prompt-tokens", default="1,16,64,256,512", show_default=True, help="Lengths of prompts to try.")
@click.option("--num-repeats", default=3, show_default=True, help="Rounds, after one to warm up.")
@engine_options
def measure(model: Path, out: Path, grid_rows: str, grid_prompt_tokens: str, num_repeats: int, **settings: Any) -> int:
    """Time the steps of MODEL here, for `servekit simulate fit`."""
    from servekit.simulate.command import numbers_of
    from servekit.simulate.measure import Grid, measure
    from servekit.simulate.profile import write_profile

    rows = numbers_of(grid_rows, "grid_rows")
    grid = Grid(
        num_rows=rows, num_prompt_tokens=numbers_of(grid_prompt_tokens, "grid_prompt_tokens"), num_repeats=num_repeats
    )
    steps = measure(EngineConfig(model=str(model), **settings), grid)
    write_profile(out, steps)
    click.echo(f"{len(steps)} steps in {out}")
    return 0


@simulate.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the cost model there, for --cost.")
def fit(profile: Path, out: Path | None) -> int:
    """Make a cost model of PROFILE, measured steps, and say how well it fits."""
    from servekit.simulate.command import fit_profile

    click.echo(fit_profile(profile, out))
    return 0


cli.add_command(make_bench(engine_options))


@cli.command(name="run-batch")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="Requests, one a line.")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="Where answers go.")
@click.option("--served-model-name", multiple=True, help="Name in requests; the folder's name unless given.")
@click.option("--pooling", default="auto", show_default=True, help="How /v1/embeddings works: none, last or mean.")
@engine_options
def run_batch(
    model: Path, source: Path, target: Path, served_model_name: tuple[str, ...], pooling: str, **settings: Any
) -> int:
    """Answer a file of requests in OpenAI's batch form with MODEL."""
    config = ServerConfig(served_model_names=served_model_name or (model.resolve().name,), pooling=pooling)
    from servekit.server import batch

    counts = batch.run_batch(EngineConfig(model=str(model), **settings), config, source, target)
    click.echo(f"{counts.answered} answered, {counts.failed} failed: {target}", err=True)
    return 0


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@engine_options
def verify(model: Path, **more: Any) -> int:
    """Check MODEL: every file by its digest, then the weights by the probes that its trainer left."""
    from common_platform.artifact import open_model_folder

    with open_model_folder(model, verify=True) as folder:
        manifest = folder.manifest
    with _load(model, more) as llm:
        facts = llm.facts
    if manifest is None:
        click.echo(f"{model}: no manifest, so nothing to hold it against; {facts.architecture} loads")
    else:
        click.echo(
            f"{model}: {len(manifest.files)} files and {len(manifest.probes)} probes agree; {facts.architecture}"
        )
    return 0


@cli.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--api-key-file", type=click.Path(path_type=Path), help=f"The first key is used. Also: {KEY_VARIABLE}.")
@click.option(
    "--interval-s", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Between two looks."
)
@click.option("--times", type=click.IntRange(1), default=None, help="Looks; unset: until interrupted.")
def top(url: str, api_key_file: Path | None, interval_s: float, times: int | None) -> int:
    """Watch the server at URL: queue, tokens a second, KV blocks, cache hits, latencies."""
    from rich.console import Console

    from servekit.server.top import fetch, watch

    key = first_key(api_key_file)
    watch(lambda: fetch(url, key), Console(), interval_s=interval_s, times=times)
    return 0


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder; SERVEKIT_TUNED=FOLDER uses it.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option(
    "--quantization", type=click.Choice(["int8", "fp8", "int4"]), multiple=True, help="Also measure its products."
)
def tune(model: Path, out: Path, dtype: str, quantization: tuple[str, ...]) -> int:
    """Measure how the kernels for MODEL are best launched on the GPU here, and write it to a file of the device."""
    from servekit.execution.tuning import tune_model

    for line in tune_model(model, out, dtype, quantization):
        click.echo(line)
    return 0


@cli.command()
def info() -> int:
    """What this machine has, and which kernels are here."""
    from common_platform.__main__ import report
    from common_platform.platforms import detect
    from servekit.kernels.choice import chosen

    platform = detect()
    click.echo(f"servekit {__version__}")
    click.echo(report(platform))
    click.echo(f"CPU kernels: {_cpu_kernels()}")
    choice = chosen(platform)
    for name, backends in _kernels().items():
        backend, reason = choice.get(name, ("", ""))
        note = f" -> {backend}" + (f" ({reason})" if reason else "") if backend else ""
        click.echo(f"kernel {name}: {', '.join(backends)}{note}")
    return 0


def _cpu_kernels() -> str:
    from servekit.kernels.native import native_library

    library = native_library()
    if library is None:
        return "reference (the C++ ones were not built: no compiler was found when this was installed)"
    return f"C++ for {library.isa}, of {', '.join(library.supported)} that this machine can run"


def _kernels() -> dict[str, list[str]]:
    """Each operation with the files that implement it."""
    from servekit import kernels

    found = {}
    for operation in pkgutil.iter_modules(kernels.__path__):
        if operation.ispkg:
            folder = [str(Path(kernels.__path__[0]) / operation.name)]
            names = [module.name for module in pkgutil.iter_modules(folder)]
            found[operation.name] = [name for name in names if name not in NOT_BACKENDS]
    return {name: backends for name, backends in found.items() if backends}


for command in cli.commands.values():
    settings.add_file_option(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 wrong usage, 3 and on as ``common_platform.errors.EXIT_CODES`` says."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        status: int | None = cli.main(arguments, prog_name="servekit", standalone_mode=False)
        return status or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return USAGE
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        return USAGE
    except (click.exceptions.Abort, KeyboardInterrupt):
        return exit_code(KeyboardInterrupt())
    except PlatformError as error:
        click.echo(f"error: {error}", err=True)
        status = exit_code(error)
        if status == 1 or _wants_traceback(arguments):
            traceback.print_exc()
        return status


def _wants_traceback(arguments: list[str] | None) -> bool:
    return "--debug" in (sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
