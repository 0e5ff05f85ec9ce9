"""What must be so after every bad request: the same tokens for the same prompt, ready, and nothing held."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from tests.servekit.server.processes import wait_until
from tests.servekit.server.rows import COMPLETIONS, completion

HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
HEALTHY_LIMIT_S, SETTLED_LIMIT_S = 1.0, 5.0


@dataclass(frozen=True)
class Sight:
    """What a look at a server shows; two looks are compared as a whole."""

    token_ids: tuple[int, ...]
    is_ready: bool
    held: tuple[float, ...]


def canary(http: httpx.Client) -> Sight:
    """A look at an idle server, once what it did before has settled."""
    assert wait_until(lambda: http.get("/health").json() == {"status": "ok"}, HEALTHY_LIMIT_S)
    body = completion(prompt="canary", max_tokens=6, temperature=0, return_token_ids=True, ignore_eos=True)
    token_ids = tuple(http.post(COMPLETIONS, json=body).json()["choices"][0]["token_ids"])
    wait_until(lambda: not any(held_by(http)), SETTLED_LIMIT_S)
    return Sight(token_ids, http.get("/health/ready").status_code == 200, held_by(http))


def held_by(http: httpx.Client) -> tuple[float, ...]:
    """Sequences that run, sequences that wait, and the share of KV blocks in use."""
    found = dict.fromkeys(HELD, 0.0)
    for line in http.get("/metrics").text.splitlines():
        name = line.partition("{")[0].removeprefix("servekit:")
        if name in found and not line.startswith("#"):
            found[name] = float(line.split()[-1])
    return tuple(found.values())
