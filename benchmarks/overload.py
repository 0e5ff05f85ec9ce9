"""Ten times what the server can do: does it go on at its best, and refuse the rest at once?

Capacity is what a closed loop of as many callers as it lets in gets out of it. Then requests come at ten times the rate
that this is, for a minute, whoever is refused does not come again. With ``--ladder`` they come at 0.8, 1, 2, 4 and 0.8
times that rate in turn, and the server's health is asked ten times a second. The model is tiny; callers share the
machine.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import Report, arguments
from servekit.bench.load import Pace
from servekit.engine.collector import short_collections
from server_overhead import Server, make_tiny, start_ours
from streams import Answer, Callers, post

SEQUENCES, QUEUE = 16, 32
SHORTEST, LENGTHS = 33, 63  # tokens: 33 to 95, 64 in the mean
LIMIT_S = 60.0
LADDER = (0.8, 1.0, 2.0, 4.0, 0.8)  # times capacity
REFUSED = (429, 503)
HEALTH_EVERY_S = 0.1


def _request(number: int) -> bytes:
    """Answers of many lengths: of one length, those that begin together end together, which no load of users does."""
    num_tokens = SHORTEST + number * 37 % LENGTHS
    asked = {"model": "tiny", "prompt": f"number {number}", "max_tokens": num_tokens, "ignore_eos": True}
    asked |= {"stream": True}
    return post("/v1/completions", asked | {"stream_options": {"include_usage": True}})


def _closed(server: Server, seconds: float) -> float:
    """Answers a second to as many callers as are let in."""
    callers = Callers(server.port)
    began = time.perf_counter()
    number = 0
    while (left_s := began + seconds - time.perf_counter()) > 0:
        while callers.num_under_way < SEQUENCES + QUEUE // 2:
            number += 1
            callers.begin(_request(number))
        callers.step(left_s)
    done = sum(answer.is_whole for answer in callers.finish())
    return done / (time.perf_counter() - began)


def _open(server: Server, rate: float, seconds: float) -> list[Answer]:
    """Callers who come at ``rate``, whatever becomes of those before them."""
    times = Pace(request_rate=rate).times(int(rate * seconds))
    requests = [_request(number) for number in range(len(times))]
    callers = Callers(server.port)
    with short_collections():  # a pause of the callers would look like one of the server
        began = time.perf_counter()
        for at, request in zip(times, requests, strict=True):
            while (left_s := began + at - time.perf_counter()) > 0:
                callers.step(left_s)
            callers.begin(request)
        return callers.finish()


def _taken_s(answers: Sequence[Answer]) -> float:
    return max(answer.began_s + answer.end_s for answer in answers) - min(answer.began_s for answer in answers)


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def measure(report: Report, server: Server, *, seconds: float) -> None:
    _closed(server, 2)  # warm
    capacity = _closed(server, seconds / 4)
    answers = _open(server, capacity * 10, seconds)
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer.end_s for answer in answers if answer.status in REFUSED]
    num_others = len(answers) - len(accepted) - len(refused)
    good = sum(answer.is_whole for answer in accepted)
    sent_s = max(answer.began_s for answer in answers) - min(answer.began_s for answer in answers)
    report.figure("capacity_requests_s", capacity)
    report.figure("offered_requests_s", len(answers) / seconds)
    report.figure("sent_requests_s", len(answers) / sent_s)
    report.figure("other_answers", num_others)
    report.figure("accepted_requests", len(accepted))
    report.figure("refused_requests", len(refused))
    report.figure("refusal_median_ms", _percentile(refused, 50) * 1e3)
    report.figure("refusal_worst_ms", _percentile(refused, 100) * 1e3)
    first = [answer.first_s for answer in accepted if answer.first_s]
    report.figure("accepted_first_token_median_ms", _percentile(first, 50) * 1e3)
    report.target("goodput over capacity", good / _taken_s(answers) / capacity, ">=", 0.9)
    report.target("99th percentile of refusals, ms", _percentile(refused, 99) * 1e3, "<=", 100.0)
    report.target("accepted requests that did not finish", len(accepted) - good, "<=", 0)
    report.target("answers that are neither", num_others, "<=", 0)


@dataclass
class Health:
    """What the server said of itself meanwhile."""

    taken_s: list[float] = field(default_factory=list)
    num_alarms: int = 0

    def watch(self, port: int, is_over: threading.Event) -> None:
        """Until it is over."""
        while not is_over.wait(HEALTH_EVERY_S):
            began = time.perf_counter()
            self.num_alarms += not _is_healthy(port)
            self.taken_s.append(time.perf_counter() - began)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=LIMIT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _rung(server: Server, rate: float, seconds: float, health: Health) -> list[Answer]:
    is_over = threading.Event()
    watching = threading.Thread(target=health.watch, args=(server.port, is_over))
    watching.start()
    try:
        return _open(server, rate, seconds)
    finally:
        is_over.set()
        watching.join()


def climb(report: Report, server: Server, *, seconds: float) -> None:
    """One rate after the other, each for ``seconds``."""
    _closed(server, 2)  # warm
    capacity = report.figure("capacity_requests_s", _closed(server, seconds / 2))
    health = Health()
    goodput, first_ms, refusal_ms, lost = [], [], [], 0
    for step, times in enumerate(LADDER):
        answers = _rung(server, capacity * times, seconds, health)
        good = [answer for answer in answers if answer.is_whole]
        refused = [answer.end_s for answer in answers if answer.status in REFUSED]
        lost += len(answers) - len(good) - len(refused)
        goodput.append(len(good) / _taken_s(answers))
        first_ms.append(_percentile([answer.first_s for answer in good], 99) * 1e3)
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
