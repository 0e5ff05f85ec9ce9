"""``servekit bench``: text to settings, settings to the benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from servekit.bench.workload import DATASETS, Workload

Command = TypeVar("Command", bound=Callable[..., Any])
KEY_VARIABLE = "OPENAI_API_KEY"


def make_bench(engine_options: Callable[[Any], Any]) -> click.Group:
    """The group of commands.

    Args:
        engine_options: adds a flag for each setting of the engine.
    """

    @click.group()
    def bench() -> None:
        """Measure a model loaded here, or any server that speaks OpenAI's HTTP."""

    bench.command(name="throughput")(_model(_workload_options(engine_options(_output_json(_throughput)))))
    bench.command(name="latency")(_model(_latency_options(engine_options(_output_json(_latency)))))
    bench.command(name="serve")(_serve_options(_workload_options(_serve)))
    return bench


def _model(command: Command) -> Command:
    return click.argument("model", type=click.Path(path_type=Path))(command)


def _output_json(command: Command) -> Command:
    return click.option("--output-json", type=click.Path(path_type=Path), help="Write the figures there.")(command)


def _all(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def _workload_options(command: Command) -> Command:
    return _all(
        command,
        click.option("--dataset-name", type=click.Choice(DATASETS), default="random", show_default=True),
        click.option("--dataset-path", type=click.Path(path_type=Path), help="JSON or JSON Lines."),
        click.option("--num-prompts", type=int, default=1000, show_default=True),
        click.option(
            "--random-input-len", "--input-len", "input_len", type=int, default=1024, show_default=True, help="Tokens."
        ),
        click.option(
            "--random-output-len",
            "--output-len",
            "--sharegpt-output-len",
            "--custom-output-len",
            "output_len",
            type=int,
            help="Tokens; unset: 128, or what the file says.",
        ),
        click.option("--random-range-ratio", "range_ratio", type=float, default=0.0, show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
    )


def _workload(settings: dict[str, Any]) -> Workload:
    """Takes its part out of ``settings``."""
    return Workload(**{name: settings.pop(name) for name in Workload.__dataclass_fields__})


def _throughput(model: Path, output_json: Path | None, **settings: Any) -> int:
    """Tokens a second of MODEL when it has all prompts at once."""
    workload = _workload(settings)
    from servekit.bench.offline import throughput
    from servekit.llm import LLM

    with LLM(str(model), **settings) as llm:
        figures = throughput(llm, workload)
    click.echo(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, {figures['tokens_per_second']:.2f} total "
        f"tokens/s, {figures['output_tokens_per_second']:.2f} output tokens/s"
    )
    return _wrote(figures, output_json)


def _latency_options(command: Command) -> Command:
    return _all(
        command,
        click.option("--input-len", type=click.IntRange(1), default=32, show_default=True, help="Tokens."),
        click.option("--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens."),
        click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True),
        click.option("--num-iters-warmup", type=click.IntRange(0), default=10, show_default=True),
        click.option("--num-iters", type=click.IntRange(1), default=30, show_default=True),
    )


def _latency(
    model: Path,
    output_json: Path | None,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    **settings: Any,
) -> int:
    """Seconds that MODEL takes for one batch."""
    from servekit.bench.offline import latency
    from servekit.llm import LLM

    with LLM(str(model), **settings) as llm:
        figures = latency(
            llm,
            input_len=input_len,
            output_len=output_len,
            batch_size=batch_size,
            num_iters=num_iters,
            num_warmup=num_iters_warmup,
        )
    click.echo(f"Avg latency: {figures['avg_latency']:.4f} seconds")
    for percent, value in figures["percentiles"].items():
        click.echo(f"{percent}% percentile latency: {value:.4f} seconds")
    return _wrote(figures, output_json)


def _wrote(figures: dict[str, Any], path: Path | None) -> int:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _serve_options(command: Command) -> Command:
    return _all(
        command,
        click.option("--backend", type=click.Choice(["openai", "openai-chat"]), default="openai", show_default=True),
        click.option("--base-url", default=None, help="http://HOST:PORT; unset: by --host and --port."),
        click.option("--host", default="127.0.0.1", show_default=True),
        click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True),
        click.option("--endpoint", default=None, help="The path; unset: by --backend."),
        click.option("--model", required=True, help="The name in requests."),
        click.option("--tokenizer", type=click.Path(path_type=Path), help="A model folder; unset: a word for a token."),
        click.option("--request-rate", type=float, default=float("inf"), show_default=True, help="A second."),
        click.option("--burstiness", type=float, default=1.0, show_default=True, help="1: a Poisson process."),
        click.option("--max-concurrency", type=int, default=None, help="Requests under way at once; unset: no bound."),
        click.option("--temperature", type=float, default=0.0, show_default=True),
        click.option("--ignore-eos", is_flag=True, help="Answers of full length, where the server knows the field."),
        click.option("--percentile-metrics", default="ttft,tpot,itl", show_default=True, help="Also: e2el."),
        click.option("--metric-percentiles", default="99", show_default=True),
        click.option("--save-result", is_flag=True, help="Write the figures to a JSON file."),
        click.option("--save-detailed", is_flag=True, help="Every request's too."),
        click.option("--result-dir", type=click.Path(path_type=Path), default=Path()),
        click.option("--result-filename", default=None),
        click.option("--api-key-file", type=click.Path(path_type=Path), help=f"Also: {KEY_VARIABLE}."),
    )


def _serve(
    base_url: str | None,
    host: str,
    port: int,
    tokenizer: Path | None,
    request_rate: float,
    burstiness: float,
    max_concurrency: int | None,
    percentile_metrics: str,
    metric_percentiles: str,
    save_result: bool,
    save_detailed: bool,
    result_dir: Path,
    result_filename: str | None,
    api_key_file: Path | None,
    **settings: Any,
) -> int:
    """Latencies and throughput of a running server; 1 where a request failed."""
    from servekit.bench.figures import parsed_metrics, parsed_percentiles
    from servekit.bench.load import Pace
    from servekit.bench.serving import ServeBench, run, save, show
    from servekit.engine.tokenizer import Tokenizer
    from servekit.server.keys import read_keys

    workload = _workload(settings)
    bench = ServeBench(
        base_url=base_url or f"http://{host}:{port}",
        workload=workload,
        pace=Pace(
            request_rate=request_rate, burstiness=burstiness, max_concurrency=max_concurrency, seed=workload.seed
        ),
        percentiles=parsed_percentiles(metric_percentiles),
        metrics=parsed_metrics(percentile_metrics),
        api_key=read_keys(api_key_file, "--api-key-file")[0] if api_key_file else os.environ.get(KEY_VARIABLE),
        **settings,
    )
    figures, records = run(bench, None if tokenizer is None else Tokenizer.from_folder(tokenizer))
    show(bench, figures, records)
    if save_result or save_detailed:
        click.echo(f"saved: {save(figures, records, result_dir, result_filename, detailed=save_detailed)}")
    return 1 if figures["failed"] else 0
