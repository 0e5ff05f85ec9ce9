"""A request as a workload has it, and the token ids that stand for its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

FIRST_MADE_UP_ID = 1 << 31  # below are the ids that a trace may name


class MadeUpTokens:
    """Token ids that nothing else has: what is drawn twice is different text."""

    def __init__(self) -> None:
        self._next = FIRST_MADE_UP_ID

    def take(self, count: int) -> range:
        self._next += count
        return range(self._next - count, self._next)


@dataclass(slots=True)
class Job:
    """One request of a workload.

    ``prompt`` is in parts, so that shared ones are kept once. From ``own_from`` on, where that is known, its tokens are
    in no other prompt but those of later turns, which saves the simulator a look. A ``follow_up`` is the next turn of a
    session: it arrives ``think_s`` after this one has ended, or at its own ``arrival`` where that is later.
    """

    arrival: float  # seconds from the start
    prompt: tuple[Sequence[int], ...]
    output: range  # the tokens that the model will answer
    priority: int = 0  # lower runs first
    tenant: str = ""
    own_from: int | None = None
    follow_up: Job | None = None
    think_s: float = 0.0

    @property
    def num_prompt(self) -> int:
        return sum(map(len, self.prompt))

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return self.num_prompt + len(self.output)

    def prompt_token_ids(self) -> list[int]:
        return list(chain.from_iterable(self.prompt))


def turns_of(job: Job) -> list[Job]:
    """``job`` and all that follow it in its session."""
    turns = [job]
    while turns[-1].follow_up is not None:
        turns.append(turns[-1].follow_up)
    return turns
