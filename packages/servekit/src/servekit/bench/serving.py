"""``servekit bench serve``: a workload sent to any server that speaks OpenAI's HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from common_platform.errors import ConfigError, ResourceError
from servekit.bench.figures import details_of, figures_of, table
from servekit.bench.load import Pace, send_all
from servekit.bench.sse import Address, Record, ask
from servekit.bench.workload import Ask, Workload, asks_of
from servekit.engine.tokenizer import Tokenizer

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """What is asked of which server, how, and what of the answers is told."""

    base_url: str
    model: str
    workload: Workload
    pace: Pace = field(default_factory=Pace)
    backend: str = "openai"
    endpoint: str | None = None  # the path; None: by the backend
    api_key: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False  # no part of OpenAI's form: vLLM and servekit know it
    limit_s: float = 6 * 3600.0  # for one answer
    percentiles: Sequence[float] = (99.0,)
    metrics: Sequence[str] = ("ttft", "tpot", "itl")

    def __post_init__(self) -> None:
        if self.backend not in ENDPOINTS:
            raise ConfigError("backend", self.backend, f"one of {', '.join(ENDPOINTS)}", flag="--backend")


def run(bench: ServeBench, tokenizer: Tokenizer | None) -> tuple[dict[str, Any], list[Record]]:
    """Send it all, and measure.

    Raises:
        ResourceError: the first answer, which is not counted, failed.
        ConfigError: the workload cannot be read.
    """
    asks = asks_of(bench.workload, tokenizer)
    address = Address.of(bench.base_url, bench.endpoint or ENDPOINTS[bench.backend])
    headers = {} if bench.api_key is None else {"Authorization": f"Bearer {bench.api_key}"}
    bodies = [json.dumps(_body(bench, one)).encode() for one in asks]

    async def send(body: bytes) -> Record:
        return await ask(address, body, headers, bench.limit_s)

    async def measured() -> tuple[list[Record], float]:
        first = await send(bodies[0])
        if not first.succeeded:
            raise ResourceError(message=f"the first request failed: {first.error or 'its stream had no end'}")
        began = time.perf_counter()
        return await send_all(bodies, send, bench.pace), time.perf_counter() - began

    records, duration_s = asyncio.run(measured())
    return _about(bench) | figures_of(records, duration_s, bench.percentiles), records


def _body(bench: ServeBench, one: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {"model": bench.model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"temperature": bench.temperature}
    if bench.ignore_eos:
        body["ignore_eos"] = True
    if bench.backend == "openai-chat":
        messages = one.messages or [{"role": "user", "content": one.prompt}]
        return body | {"messages": messages, "max_completion_tokens": one.output_len}
    return body | {"prompt": one.prompt, "max_tokens": one.output_len}


def _about(bench: ServeBench) -> dict[str, Any]:
    rate = bench.pace.request_rate
    return {
        "date": datetime.now().astimezone().strftime("%Y%m%d-%H%M%S"),
        "backend": bench.backend,
        "model_id": bench.model,
        "num_prompts": bench.workload.num_prompts,
        "request_rate": rate if rate < float("inf") else "inf",
        "burstiness": bench.pace.burstiness,
        "max_concurrency": bench.pace.max_concurrency,
    }


def show(bench: ServeBench, figures: dict[str, Any], records: Sequence[Record]) -> None:
    click.echo(table(figures, bench.metrics, bench.percentiles))
    told = {record.error for record in records if record.error}
    for error in sorted(told)[:5]:
        click.echo(f"failed: {error}", err=True)


def save(figures: dict[str, Any], records: Sequence[Record], folder: Path, name: str | None, *, detailed: bool) -> Path:
    """Where ``vllm bench serve`` would put it."""
    base = str(figures["model_id"]).rpartition("/")[2]
    rate = figures["request_rate"]
    path = folder / (name or f"{figures['backend']}-{rate}qps-{base}-{figures['date']}.json")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures | (details_of(records) if detailed else {}), indent=1) + "\n")
    return path
