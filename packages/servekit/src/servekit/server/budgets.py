"""What one key may use: requests at once, requests a minute, tokens a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from common_platform.errors import ConfigError
from servekit.server.errors import RateLimited

MINUTE_S = 60.0
SOON_S = 1.0  # when to come back where the end of another request is what is waited for


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Of each key, or of all callers together where there are no keys. None: no bound."""

    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompts and answers

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "1 or more", flag=_flag(name))


def _flag(name: str) -> str:
    return "--key-" + name.replace("_", "-")


class _Bucket:
    """Fills up evenly to what a minute allows; may be overdrawn, as an answer's length is known at its end."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_second = per_minute / MINUTE_S
        self._most = float(per_minute)
        self._level = self._most
        self._at = now

    def wait_s(self, wanted: float, now: float) -> float:
        """Seconds until ``wanted`` is there."""
        self._level = min(self._most, self._level + (now - self._at) * self._per_second)
        self._at = now
        return max(0.0, (wanted - self._level) / self._per_second)

    def take(self, amount: float) -> None:
        self._level -= amount


class _Account:
    def __init__(self, budget: Budget, now: float) -> None:
        self.num_running = 0
        self.requests = None if budget.requests_per_minute is None else _Bucket(budget.requests_per_minute, now)
        self.tokens = None if budget.tokens_per_minute is None else _Bucket(budget.tokens_per_minute, now)


class Budgets:
    """The accounts of all keys; there are no more of them than keys."""

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, tenant: str) -> None:
        """Take one request on the account of ``tenant``; ``leave`` follows.

        Raises:
            RateLimited: it is over its share; it tells when to come back.
        """
        now, budget = self._clock(), self._budget
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(budget, now)
        most = budget.max_concurrent_requests
        if most is not None and account.num_running >= most:
            raise _over(f"{account.num_running} requests of this key are under way", most, "max_concurrent_requests")
        if account.tokens is not None and (wait_s := account.tokens.wait_s(1, now)):
            what = "the tokens of this minute are used up"
            raise _over(what, budget.tokens_per_minute, "tokens_per_minute", wait_s)
        if account.requests is not None:
            if wait_s := account.requests.wait_s(1, now):
                what = "the requests of this minute are used up"
                raise _over(what, budget.requests_per_minute, "requests_per_minute", wait_s)
            account.requests.take(1)
        account.num_running += 1

    def leave(self, tenant: str, num_tokens: int) -> None:
        account = self._accounts[tenant]
        account.num_running -= 1
        if account.tokens is not None:
            account.tokens.take(num_tokens)


def _over(what: str, limit: int | None, name: str, wait_s: float = SOON_S) -> RateLimited:
    message = f"{what}; allowed {limit}; change with {_flag(name)}"
    return RateLimited(code="rate_limit_exceeded", message=message, retry_after_s=wait_s)
