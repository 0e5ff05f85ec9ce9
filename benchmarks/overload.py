"""Ten times what the server can do: does it go on at its best, and refuse the rest at once?

Capacity is what a closed loop of as many callers as it lets in gets out of it. Then requests come at ten times the rate
that this is, for a minute, whoever is refused does not come again. The model is tiny; callers share the machine.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common import Report, arguments
from servekit.bench.load import Pace, send_all
from servekit.bench.sse import Address, Record, ask
from server_overhead import Server, make_tiny, start_ours

SEQUENCES, QUEUE = 16, 32
TOKENS = 64
LIMIT_S = 60.0


def _body(number: int) -> bytes:
    asked = {"model": "tiny", "prompt": f"number {number}", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    return json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()


async def _closed(address: Address, seconds: float) -> float:
    """Answers a second to as many callers as are let in."""
    done, number = 0, 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal done, number
        while time.perf_counter() < end:
            number += 1
            done += (await ask(address, _body(number), {}, LIMIT_S)).succeeded

    began = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(SEQUENCES + QUEUE // 2)])
    return done / (time.perf_counter() - began)


async def _open(address: Address, rate: float, seconds: float) -> list[Record]:
    bodies = [_body(i) for i in range(int(rate * seconds))]

    async def send(body: bytes) -> Record:
        return await ask(address, body, {}, LIMIT_S)

    return await send_all(bodies, send, Pace(request_rate=rate))


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def measure(report: Report, server: Server, *, quick: bool) -> None:
    address = Address.of(f"http://127.0.0.1:{server.port}", "/v1/completions")
    asyncio.run(_closed(address, 2))  # warm
    capacity = asyncio.run(_closed(address, 5 if quick else 15))
    seconds = 20.0 if quick else 60.0
    records = asyncio.run(_open(address, capacity * 10, seconds))
    accepted = [record for record in records if record.status == 200]
    refused = [record.ended - record.began for record in records if record.status == 503]
    others = [r for r in records if r.status not in (200, 503)]
    taken = max(r.ended for r in records) - min(r.began for r in records)
    good = sum(record.succeeded for record in accepted)
    report.figure("capacity_requests_s", capacity)
    report.figure("offered_requests_s", len(records) / seconds)
    report.figure("accepted_requests", len(accepted))
    report.figure("refused_requests", len(refused))
    report.figure("refusal_median_ms", median(refused) * 1e3)
    report.figure("accepted_first_token_median_ms", median(r.first - r.began for r in accepted if r.first) * 1e3)
    report.target("goodput over capacity", good / taken / capacity, ">=", 0.9)
    report.target("99th percentile of refusals, ms", _percentile(refused, 99) * 1e3, "<=", 100.0)
    report.target("accepted requests that did not finish", len(accepted) - good, "<=", 0)
    report.target("answers that are neither", len(others), "<=", 0)


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        flags = ("--max-num-seqs", str(SEQUENCES), "--max-queue", str(QUEUE), "--log-level", "error")
        server = start_ours(make_tiny(Path(work)), *flags)
        try:
            measure(report, server, quick=options.quick)
        finally:
            server.close()
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
