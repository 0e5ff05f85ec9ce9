"""A span of OpenTelemetry for each request (``pip install 'servekit[otel]'``).

The names are those of OpenTelemetry's conventions for generative AI. A span begins when the request was queued and
ends with it; what happened between stands in it as events. Prompts and answers are never part of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common_platform.errors import ConfigError, ResourceError
from servekit.core.request import RequestEvent
from servekit.engine.config import EngineConfig
from servekit.engine.validate import EngineRequest

NS = 1_000_000_000
LATENCIES = {  # seconds since it was queued
    "scheduled": "gen_ai.latency.time_in_queue",
    "first_token": "gen_ai.latency.time_to_first_token",
    "finished": "gen_ai.latency.e2e",
}


class RequestTracer:
    """Sends spans.

    Args:
        provider: an OpenTelemetry ``TracerProvider``.
        model: the name that spans carry.
    """

    def __init__(self, provider: Any, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("servekit")
        self._model = model

    @classmethod
    def of(cls, config: EngineConfig) -> RequestTracer | None:
        """What ``config`` asks for; None without an endpoint."""
        endpoint = config.otlp_traces_endpoint
        return None if endpoint is None else cls.to_endpoint(endpoint, Path(config.model).name)

    @classmethod
    def to_endpoint(cls, endpoint: str, model: str) -> RequestTracer:
        """Send spans to an OTLP collector over HTTP, in batches from a thread of their own.

        Args:
            endpoint: such as ``http://localhost:4318/v1/traces``.

        Raises:
            ConfigError: it is no HTTP address.
            ResourceError: the extra is not installed.
        """
        if not endpoint.startswith(("http://", "https://")):
            limit = "http://HOST:PORT/PATH or https://..."
            raise ConfigError("otlp_traces_endpoint", endpoint, limit, flag="--otlp-traces-endpoint")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ResourceError(message="otlp_traces_endpoint needs: pip install 'servekit[otel]'") from error
        provider = TracerProvider(resource=Resource.create({"service.name": "servekit"}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider, model)

    def ended(
        self,
        request: EngineRequest,
        events: Sequence[RequestEvent],
        *,
        num_output_tokens: int,
        num_cached_tokens: int,
        finish_reasons: Sequence[str],
    ) -> None:
        """The last word about ``request``."""
        if not events:
            return
        to_wall = time.time_ns() - time.monotonic_ns()
        at = [to_wall + int(event.at * NS) for event in events]
        params = request.sampling
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.max_tokens": params.max_tokens or 0,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": num_output_tokens,
            "gen_ai.usage.cached_tokens": num_cached_tokens,
            "gen_ai.response.finish_reasons": list(finish_reasons),
        }
        for event, moment in reversed(list(zip(events, at, strict=True))):  # the first of a kind counts
            if event.name in LATENCIES:
                attributes[LATENCIES[event.name]] = (moment - at[0]) / NS
        span = self._tracer.start_span("llm_request", start_time=at[0], attributes=attributes)
        for event, moment in zip(events, at, strict=True):
            span.add_event(event.name, timestamp=moment)
        span.end(end_time=max(at))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
