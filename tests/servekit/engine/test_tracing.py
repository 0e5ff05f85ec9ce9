"""A span a request: when, how much, and how it ended; sent to a collector over real HTTP."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.tiny import make_folder

from common_platform.errors import ConfigError
from servekit import LLM, SamplingParams
from servekit.engine.tracing import RequestTracer


@pytest.fixture
def collector():
    """An endpoint, and the spans that reached it."""
    spans = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = ExportTraceServiceRequest()
            body.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(s for r in body.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def values(span):
    found = {}
    for attribute in span.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_each_request_is_a_span(collector, tmp_path):
    endpoint, spans = collector
    folder = make_folder(tmp_path / "tiny")
    before = time.time_ns()
    prompts = [list(range(10, 30)), list(range(40, 75))]
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    with LLM(folder, kv_cache_memory_bytes=4 << 20, otlp_traces_endpoint=endpoint) as llm:
        llm.generate(prompts, [params, SamplingParams(max_tokens=3, n=2, ignore_eos=True)])
        llm.generate(prompts[0], params)
    after = time.time_ns()
    assert len(spans) == 3
    assert {span.name for span in spans} == {"llm_request"}
    first, second, again = sorted(spans, key=lambda span: values(span)["gen_ai.request.id"])
    assert values(first)["gen_ai.request.model"] == "tiny"
    assert values(first)["gen_ai.usage.input_tokens"] == 20
    assert values(first)["gen_ai.usage.output_tokens"] == 5
    assert values(second)["gen_ai.usage.output_tokens"] == 6
    assert values(second)["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert values(again)["gen_ai.usage.cached_tokens"] == 19
    for span in spans:
        assert before <= span.start_time_unix_nano <= span.end_time_unix_nano <= after
        names = [event.name for event in span.events]
        assert {"queued", "scheduled", "first_token", "finished"} <= set(names)
        latencies = values(span)
        queue, token, whole = (f"gen_ai.latency.{n}" for n in ("time_in_queue", "time_to_first_token", "e2e"))
        assert 0 <= latencies[queue] <= latencies[token] <= latencies[whole]


def test_a_collector_that_is_away_changes_no_answer(tmp_path):
    folder = make_folder(tmp_path / "tiny")
    with LLM(folder, kv_cache_memory_bytes=4 << 20) as llm:
        wanted = llm.generate("x", SamplingParams(temperature=0))[0].outputs[0].token_ids
    with LLM(folder, kv_cache_memory_bytes=4 << 20, otlp_traces_endpoint="http://127.0.0.1:9/none") as llm:
        assert llm.generate("x", SamplingParams(temperature=0))[0].outputs[0].token_ids == wanted


def test_a_wrong_endpoint_is_named():
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        RequestTracer.to_endpoint("localhost:4317", "M")
