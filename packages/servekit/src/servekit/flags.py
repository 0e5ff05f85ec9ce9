"""The flags of the commands, as data: each is said once, and becomes a setting here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import click

from servekit.engine.config import EngineConfig
from servekit.execution.speculative import SpeculativeConfig
from servekit.server.budgets import Budget
from servekit.server.config import ServerConfig
from servekit.server.keys import read_keys
from servekit.server.limits import ServerLimits, flag_of

KEY_VARIABLE, ADMIN_KEY_VARIABLE = "SERVEKIT_API_KEY", "SERVEKIT_ADMIN_KEY"
Command = TypeVar("Command", bound=Callable[..., Any])

ENGINE_HELP = {
    "dtype": "auto, float32, bfloat16 or float16.",
    "num_threads": "CPU threads; 0: torch's choice.",
    "max_model_len": "Longest context in tokens; unset: what the model was made for.",
    "block_size": "Tokens per KV block.",
    "kv_cache_memory_bytes": "Memory for keys and values; unset: by --gpu-memory-utilization.",
    "gpu_memory_utilization": "Share of the memory for weights, keys and values; unset: 90 % on a GPU.",
    "kv_offload_bytes": "Size of a second tier for prefixes that left the cache; 0: none.",
    "kv_offload_folder": "Keep that tier on the disk of this folder; unset: in host memory.",
    "max_num_seqs": "Sequences computed together.",
    "max_num_batched_tokens": "Tokens a step computes at the most.",
    "long_prefill_token_threshold": "Longest prefill chunk of one request in a step; 0: no bound.",
    "scheduling_policy": "fcfs, priority or fair.",
    "device": "auto, cpu, cuda, cuda:1, xpu; auto takes a GPU where there is one.",
    "kernels": "native (C++, on a CPU), triton (on a GPU), reference (torch), or auto.",
    "kv_cache_dtype": "auto, int8, or on a GPU fp8: keys and values of 8 bits, so that twice as many fit.",
    "enforce_eager": "Launch the kernels of a GPU one by one in place of recorded graphs; starts sooner, runs slower.",
    "quantization": "int8, int4 or (on a GPU) fp8 weights; activations of 8 bits, but of 16 beside int4 on a GPU.",
    "tensor_parallel_size": "Devices that share the weights; more than 1 is refused: this engine uses one.",
    "enable_lora": "Refused: this engine has no adapters.",
    "prefix_caching_hash_algo": "sha256: how blocks of the prefix cache are told apart; there is no other.",
    "allow_nonfinite": "Take a hand-off artifact although some of its weights are not finite.",
    "deterministic": "Give a request the same tokens and logprobs whatever else is computed; slower.",
    "otlp_traces_endpoint": "OpenTelemetry collector that gets a span a request: http://HOST:4318/v1/traces.",
}

OTHER_NAMES = {"tensor_parallel_size": ("-tp",)}  # vLLM's


def engine_options(command: Command) -> Command:
    """One option for each setting of the engine, with its own default."""
    types = get_type_hints(EngineConfig)
    for name in reversed(ENGINE_HELP):
        default = getattr(EngineConfig(model=""), name)
        kind = next(kind for kind in (get_args(types[name]) or (types[name],)) if kind is not type(None))
        option = click.option(
            flag_of(name),
            *OTHER_NAMES.get(name, ()),
            type=kind,
            is_flag=kind is bool,
            default=default,
            help=ENGINE_HELP[name],
            show_default=default is not None,
        )
        command = option(command)
    command = click.option(
        "--speculative-config",
        metavar="JSON",
        callback=lambda context, option, text: text and SpeculativeConfig.parse(text),
        help='Drafts: {"num_speculative_tokens": 4} by prompt lookup, {"model": PATH} by a draft model.',
    )(command)
    command = click.option(
        "--logits-processors",
        metavar="MODULE:CLASS,...",
        callback=lambda context, option, text: [name.strip() for name in text.split(",")] if text else [],
        help="Classes of your own that see the logits of every request.",
    )(command)
    command = click.option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        default=True,
        show_default=True,
        help="Compute long prompts over several steps, beside others; else a prompt waits for a step of its own size.",
    )(command)
    prefix = click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        " /--no-prefix-caching",
        default=True,
        show_default=True,
        help="Reuse shared prefixes.",
    )
    return prefix(command)


def limit_options(command: Command) -> Command:
    """One option for each limit of the server."""
    hints = get_type_hints(ServerLimits, include_extras=True)
    for name in reversed(ServerLimits.__struct_fields__):
        annotated, meta = get_args(hints[name])
        kind = float if annotated is float else int
        default = getattr(ServerLimits(), name)
        option = click.option(
            flag_of(name),
            type=kind,
            default=default,
            help=f"Limit: {meta.description}.",
            show_default=default is not None,
        )
        command = option(command)
    return command


BUDGET_HELP = {
    "max_concurrent_requests": "Requests of one key at once; unset: no bound.",
    "requests_per_minute": "Requests of one key in a minute; unset: no bound.",
    "tokens_per_minute": "Tokens of one key in a minute, prompts and answers; unset: no bound.",
}


def budget_options(command: Command) -> Command:
    """One option for each thing that a key may use so much of."""
    for name in reversed(BUDGET_HELP):
        command = click.option(flag_of(f"key_{name}"), type=int, default=None, help=BUDGET_HELP[name])(command)
    return command


SERVER_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port."),
    click.option("--api-key", multiple=True, help="A key that callers need. Others see it in the process list."),
    click.option("--api-key-file", type=click.Path(path_type=Path), help=f"Keys, one a line. Also: {KEY_VARIABLE}."),
    click.option("--served-model-name", multiple=True, help="Name in requests; the folder's name unless given."),
    click.option(
        "--admin-port", type=click.IntRange(0, 65535), default=None, help="Management listens here; 0: any port."
    ),
    click.option("--admin-host", default="127.0.0.1", show_default=True, help="Address for management."),
    click.option("--admin-key-file", type=click.Path(path_type=Path), help=f"Its keys. Also: {ADMIN_KEY_VARIABLE}."),
    click.option("--ssl-certfile", default=None, help="Speak TLS with this certificate."),
    click.option("--ssl-keyfile", default=None, help="The certificate's key, where it is in a file of its own."),
    click.option("--ssl-ca-certs", default=None, help="Callers must show a certificate of these."),
    click.option("--allowed-origins", multiple=True, help="Pages that may call the server: https://HOST, or *."),
    click.option(
        "--public-page", is_flag=True, help="Give the page at / to those without a key, who are asked for one there."
    ),
    click.option("--max-engine-restarts", default=3, show_default=True, help="Starts of a dead engine in ten minutes."),
    click.option(
        "--allow-insecure-bind", "--insecure-no-auth", is_flag=True, help="Listen beyond loopback without a key."
    ),
    click.option("--ignore-unknown-fields", is_flag=True, help="Do not refuse fields that are not known."),
    click.option("--allow-request-priority", is_flag=True, help="Let callers set priority."),
    click.option("--enable-prompt-embeds", is_flag=True, help="Take embeddings in place of prompts, in safetensors."),
    click.option(
        "--tool-call-parser", default="auto", show_default=True, help="How the model writes calls; none: no tools."
    ),
    click.option(
        "--reasoning-parser", default="auto", show_default=True, help="How it writes reasoning; none: as text."
    ),
    click.option("--allow-request-chat-template", is_flag=True, help="Let callers bring a chat template."),
    click.option("--chat-template", default=None, help="A file with the chat template; unset: the model's own."),
    click.option(
        "--allowed-media-domains", multiple=True, help="A host whose pictures may be named by URL; none unless given."
    ),
    click.option(
        "--allowed-media-dirs",
        "--allowed-local-media-path",
        multiple=True,
        help="A folder whose pictures may be named by file: URLs; none unless given.",
    ),
    click.option("--pooling", default="auto", show_default=True, help="How /v1/embeddings works: none, last or mean."),
    click.option(
        "--shutdown-timeout-s", "--drain-s", default=30.0, show_default=True, help="Seconds for requests to end."
    ),
    click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info"),
)


def server_options(command: Command) -> Command:
    """What is said of a server once, and of the keys and limits of its callers."""
    for option in reversed(SERVER_OPTIONS):
        command = option(command)
    return command


def server_config(model: Path, flags: dict[str, Any]) -> ServerConfig:
    """The server's settings, taken out of ``flags``: those left are the engine's.

    Raises:
        ConfigError: one of them cannot be.
    """
    limits = ServerLimits(**{name: flags.pop(name) for name in ServerLimits.__struct_fields__})
    budget = Budget(**{name: flags.pop(f"key_{name}") for name in Budget.__struct_fields__})
    api_key_file: Path | None = flags.pop("api_key_file")
    keys: dict[str, Any] = {
        "api_keys": (*flags.pop("api_key"), *key_from_environment(KEY_VARIABLE)),
        "api_key_file": None if api_key_file is None else str(api_key_file),
        "admin_keys": (*_admin_keys(flags.pop("admin_key_file")), *key_from_environment(ADMIN_KEY_VARIABLE)),
    }
    names = flags.pop("served_model_name") or (model.resolve().name,)
    as_they_are = {name: flags.pop(name) for name in ServerConfig.__struct_fields__ if name in flags}
    return ServerConfig(**as_they_are, **keys, served_model_names=names, limits=limits, budget=budget)


def _admin_keys(path: Path | None) -> tuple[str, ...]:
    return () if path is None else read_keys(path, "--admin-key-file")


def key_from_environment(name: str) -> tuple[str, ...]:
    """Taken out of the environment, so that no child process inherits it."""
    key = os.environ.pop(name, None)
    return () if key is None else (key,)


def first_key(path: Path | None) -> str | None:
    """Of a file, or of the environment."""
    keys = read_keys(path) if path is not None else key_from_environment(KEY_VARIABLE)
    return keys[0] if keys else None


def talk_options(command: Command) -> Command:
    """How an answer is drawn, and the key of a server that is asked."""
    options = [
        click.option("--temperature", default=0.0, show_default=True),
        click.option("--top-p", default=1.0, show_default=True),
        click.option("--seed", type=int, default=None),
        click.option("--api-key-file", type=click.Path(path_type=Path), help=f"Of a server. Also: {KEY_VARIABLE}."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
