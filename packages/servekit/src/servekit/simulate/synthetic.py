"""Workloads by dice: arrivals, lengths, shared prefixes and sessions, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common_platform.errors import ConfigError
from servekit.simulate.job import Job, MadeUpTokens, turns_of
from servekit.simulate.trace import MOST_TOKENS, read_trace

ARRIVALS = ("poisson", "constant", "burst")
LENGTHS = "fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or trace:FILE"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, each 1 or more."""

    kind: str  # fixed | uniform | lognormal | trace
    numbers: tuple[float, ...] = ()  # the length; the bounds, both included; median and sigma
    seen: tuple[int, ...] = ()  # lengths of a trace, drawn with equal chances

    @classmethod
    def parse(cls, text: str, name: str) -> Lengths:
        """``fixed:N``, ``uniform:LOW:HIGH``, ``lognormal:MEDIAN:SIGMA``, or ``trace:FILE``.

        Args:
            name: the setting: ``prompt_tokens`` or ``output_tokens``, which are also what is read of a trace.

        Raises:
            ConfigError: it is none of these, or a number is out of its range.
        """
        kind, _, rest = text.partition(":")
        flag = "--" + name.replace("_", "-")
        if kind == "trace" and rest:
            turns = [turn for job in read_trace(rest) for turn in turns_of(job)]
            return cls(kind, seen=tuple(t.num_prompt if name == "prompt_tokens" else len(t.output) for t in turns))
        try:
            numbers = tuple(float(number) for number in rest.split(":"))
        except ValueError:
            raise ConfigError(name, text, LENGTHS, flag=flag) from None
        if (kind, len(numbers)) not in (("fixed", 1), ("uniform", 2), ("lognormal", 2)):
            raise ConfigError(name, text, LENGTHS, flag=flag)
        lengths = numbers[:1] if kind == "lognormal" else numbers
        if not all(1 <= number <= MOST_TOKENS for number in lengths) or list(lengths) != sorted(lengths):
            raise ConfigError(name, text, f"lengths of 1..{MOST_TOKENS}, the lower first", flag=flag)
        if kind != "lognormal" and any(number != int(number) for number in numbers):
            raise ConfigError(name, text, "whole numbers of tokens", flag=flag)
        if kind == "lognormal" and not 0 <= numbers[1] <= 10:
            raise ConfigError(name, text, "a sigma of 0..10", flag=flag)
        return cls(kind, numbers)

    def draw(self, chance: random.Random) -> int:
        if self.kind == "fixed":
            return int(self.numbers[0])
        if self.kind == "uniform":
            return chance.randint(int(self.numbers[0]), int(self.numbers[1]))
        if self.kind == "trace":
            return chance.choice(self.seen)
        drawn = chance.lognormvariate(math.log(self.numbers[0]), self.numbers[1])
        return min(max(round(drawn), 1), MOST_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticWorkload:
    """What to draw. A session's later turns have all that was said before in front of their prompts."""

    num_requests: int = 1000  # sessions, where ``num_turns`` is above 1
    request_rate: float = 10.0  # a second; infinity: all at once
    arrivals: str = "poisson"  # poisson | constant | burst
    burst_size: int = 10  # requests that come together, as many a second in all as ``request_rate`` says
    prompt_tokens: Lengths = field(default=Lengths("fixed", (200.0,)))  # the shared prefix not counted
    output_tokens: Lengths = field(default=Lengths("fixed", (200.0,)))
    num_prefix_groups: int = 0  # each request begins with the prefix of one of them
    prefix_tokens: int = 0
    num_turns: int = 1
    think_s: float = 1.0  # mean time between an answer and the next turn, exponential
    num_tenants: int = 1
    num_priorities: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise ConfigError("arrivals", self.arrivals, f"one of {ARRIVALS}", flag="--arrivals")
        for name in ("num_requests", "burst_size", "num_turns", "num_tenants", "num_priorities"):
            self._at_least(name, 1)
        for name in ("num_prefix_groups", "prefix_tokens", "think_s"):
            self._at_least(name, 0)
        if not self.request_rate > 0:
            raise ConfigError("request_rate", self.request_rate, "above 0, a second", flag="--request-rate")
        if bool(self.num_prefix_groups) != bool(self.prefix_tokens):
            limit = "num_prefix_groups and prefix_tokens above 0, or both 0"
            raise ConfigError("prefix_tokens", self.prefix_tokens, limit, flag="--num-prefix-groups")
        if self.prefix_tokens > MOST_TOKENS:
            raise ConfigError("prefix_tokens", self.prefix_tokens, f"0..{MOST_TOKENS}", flag="--prefix-tokens")

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(name, value, f"{low} or more", flag="--" + name.replace("_", "-"))

    def jobs(self) -> list[Job]:
        """First turns in the order of their arrival; later ones follow them."""
        chance = random.Random(self.seed)
        made = MadeUpTokens()
        groups = [made.take(self.prefix_tokens) for _ in range(self.num_prefix_groups)]
        times = self._times(chance)
        return [self._session(next(times), groups, made, chance) for _ in range(self.num_requests)]

    def _times(self, chance: random.Random) -> Iterator[float]:
        at, size = 0.0, self.burst_size if self.arrivals == "burst" else 1
        while True:
            for _ in range(size):
                yield at
            at += chance.expovariate(self.request_rate) if self.arrivals == "poisson" else size / self.request_rate

    def _session(self, at: float, groups: list[range], made: MadeUpTokens, chance: random.Random) -> Job:
        before: tuple[Sequence[int], ...] = (chance.choice(groups),) if groups else ()
        tenant = f"tenant-{chance.randrange(self.num_tenants)}"
        priority = chance.randrange(self.num_priorities)
        first = last = self._turn(at, before, made, chance, priority, tenant)
        for _ in range(self.num_turns - 1):
            last.think_s = chance.expovariate(1 / self.think_s) if self.think_s else 0.0
            last.follow_up = self._turn(0.0, (*last.prompt, last.output), made, chance, priority, tenant)
            last = last.follow_up
        return first

    def _turn(
        self,
        at: float,
        before: tuple[Sequence[int], ...],
        made: MadeUpTokens,
        chance: random.Random,
        priority: int,
        tenant: str,
    ) -> Job:
        prompt = made.take(self.prompt_tokens.draw(chance))
        output = made.take(self.output_tokens.draw(chance))
        return Job(at, (*before, prompt), output, priority, tenant, own_from=sum(map(len, before)))
