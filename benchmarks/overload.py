"""Ten times what the server can do: does it go on at its best, and refuse the rest at once?

Capacity is what a closed loop of as many callers as it lets in gets out of it. Then requests come at ten times the rate
that this is, for a minute, whoever is refused does not come again. With ``--ladder`` they come at 0.8, 1, 2, 4 and 0.8
times that rate in turn, and the server's health is asked ten times a second. The model is tiny; callers share the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import Report, arguments
from servekit.bench.load import Pace, send_all
from servekit.bench.sse import Address, Record, ask
from server_overhead import Server, make_tiny, start_ours

SEQUENCES, QUEUE = 16, 32
TOKENS = 64
LIMIT_S = 60.0
LADDER = (0.8, 1.0, 2.0, 4.0, 0.8)  # times capacity
REFUSED = (429, 503)
HEALTH_EVERY_S = 0.1


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
            record = await ask(address, _body(number), {}, LIMIT_S)
            done += record.succeeded  # not in one line: what others count meanwhile would be lost

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


def measure(report: Report, server: Server, *, seconds: float) -> None:
    address = Address.of(f"http://127.0.0.1:{server.port}", "/v1/completions")
    asyncio.run(_closed(address, 2))  # warm
    capacity = asyncio.run(_closed(address, seconds / 4))
    records = asyncio.run(_open(address, capacity * 10, seconds))
    accepted = [record for record in records if record.status == 200]
    refused = [record.ended - record.began for record in records if record.status in REFUSED]
    others = [r for r in records if r.status not in (200, *REFUSED)]
    taken = max(r.ended for r in records) - min(r.began for r in records)
    good = sum(record.succeeded for record in accepted)
    report.figure("capacity_requests_s", capacity)
    report.figure("offered_requests_s", len(records) / seconds)
    report.figure("sent_requests_s", len(records) / (max(r.began for r in records) - min(r.began for r in records)))
    report.figure("other_answers", len(others))
    report.figure("accepted_requests", len(accepted))
    report.figure("refused_requests", len(refused))
    report.figure("refusal_median_ms", _percentile(refused, 50) * 1e3)
    first = [record.first - record.began for record in accepted if record.first]
    report.figure("accepted_first_token_median_ms", _percentile(first, 50) * 1e3)
    report.target("goodput over capacity", good / taken / capacity, ">=", 0.9)
    report.target("99th percentile of refusals, ms", _percentile(refused, 99) * 1e3, "<=", 100.0)
    report.target("accepted requests that did not finish", len(accepted) - good, "<=", 0)
    report.target("answers that are neither", len(others), "<=", 0)


@dataclass
class Health:
    """What the server said of itself meanwhile."""

    taken_s: list[float] = field(default_factory=list)
    num_alarms: int = 0

    async def watch(self, port: int) -> None:
        """Until it is cancelled."""
        while True:
            began = time.perf_counter()
            self.num_alarms += not await asyncio.to_thread(_is_healthy, port)
            self.taken_s.append(time.perf_counter() - began)
            await asyncio.sleep(HEALTH_EVERY_S)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=LIMIT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def _rung(server: Server, rate: float, seconds: float, health: Health) -> list[Record]:
    watching = asyncio.create_task(health.watch(server.port))
    try:
        return await _open(Address.of(f"http://127.0.0.1:{server.port}", "/v1/completions"), rate, seconds)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def climb(report: Report, server: Server, *, seconds: float) -> None:
    """One rate after the other, each for ``seconds``."""
    address = Address.of(f"http://127.0.0.1:{server.port}", "/v1/completions")
    asyncio.run(_closed(address, 2))  # warm
    capacity = report.figure("capacity_requests_s", asyncio.run(_closed(address, seconds / 2)))
    health = Health()
    goodput, first_ms, refusal_ms, lost = [], [], [], 0
    for step, times in enumerate(LADDER):
        records = asyncio.run(_rung(server, capacity * times, seconds, health))
        taken = max(r.ended for r in records) - min(r.began for r in records)
        good = [record for record in records if record.succeeded]
        refused = [record.ended - record.began for record in records if record.status in REFUSED]
        lost += len(records) - len(good) - len(refused)
        goodput.append(len(good) / taken)
        first_ms.append(_percentile([r.first - r.began for r in good], 99) * 1e3)
        refusal_ms.append(_percentile(refused, 99) * 1e3)
        at = f"step_{step + 1}_of_{times:g}x"
        report.figure(f"{at}_goodput_requests_s", goodput[-1])
        report.figure(f"{at}_first_token_p99_ms", first_ms[-1])
        report.figure(f"{at}_refused", len(refused))
        report.figure(f"{at}_refusal_p99_ms", refusal_ms[-1])
    report.target("goodput at 4x over the best", goodput[3] / max(goodput), ">=", 0.9)
    report.target("99th percentile of refusals, ms", max(refusal_ms), "<=", 250.0)
    report.target("requests neither answered nor refused", lost, "<=", 0)
    report.target("first token's p99 at 4x over that at 0.8x", first_ms[3] / first_ms[0], "<=", 3.0)
    report.target("goodput at the end apart from that at the start", abs(goodput[4] / goodput[0] - 1), "<=", 0.05)
    report.target("health: 99th percentile, ms", _percentile(health.taken_s, 99) * 1e3, "<=", 100.0)
    report.target("health: false alarms", health.num_alarms, "<=", 0)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--ladder", action="store_true", help="several rates in turn")
    parser.add_argument("--seconds", type=float, default=0, help="of each rate; default: 60, or 20 with --quick")
    return parser.parse_args()


def main() -> None:
    options = _options()
    seconds = options.seconds or (20.0 if options.quick else 60.0)
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        flags = ("--max-num-seqs", str(SEQUENCES), "--max-queue", str(QUEUE), "--log-level", "error")
        server = start_ours(make_tiny(Path(work)), *flags)
        try:
            (climb if options.ladder else measure)(report, server, seconds=seconds)
        finally:
            server.close()
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
