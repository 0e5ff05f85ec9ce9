"""One request's whole life: its states, the one table of transitions, and the news that it sends out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgspec

from servekit.core.plan import TokenLogprob
from servekit.core.prompt_embeds import PromptEmbeds
from servekit.sampling.parameters import SamplingParams


class RequestState(Enum):
    WAITING = "waiting"  # in the queue, owns no blocks
    WAITING_GRAMMAR = "waiting_grammar"  # held until its grammar is compiled
    WAITING_MEDIA = "waiting_media"  # held until its images or sounds are decoded
    WAITING_REMOTE_KV = "waiting_remote_kv"  # held until keys and values arrive from elsewhere
    WAITING_FORK = "waiting_fork"  # held until its sibling has computed the prompt that they share
    RUNNING = "running"  # owns a slot and blocks, computes tokens
    PREEMPTED = "preempted"  # gave both back, will compute its tokens again
    FINISHED = "finished"


HELD = {
    RequestState.WAITING_GRAMMAR,
    RequestState.WAITING_MEDIA,
    RequestState.WAITING_REMOTE_KV,
    RequestState.WAITING_FORK,
}

NEXT_STATES: dict[RequestState, set[RequestState]] = {
    RequestState.WAITING: {RequestState.RUNNING, RequestState.FINISHED},
    **{held: {RequestState.WAITING, RequestState.WAITING_FORK, RequestState.FINISHED} for held in HELD},
    RequestState.RUNNING: {RequestState.PREEMPTED, RequestState.FINISHED},
    RequestState.PREEMPTED: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}


class FinishReason(Enum):
    STOP = "stop"  # an end-of-text token, a stop token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the caller went away or asked for it
    TIMEOUT = "timeout"  # its deadline passed
    ERROR = "error"  # its own row failed; the others went on


class IllegalTransition(RuntimeError):
    """A state was assigned that the table does not allow: a bug of ours."""


class RequestEvent(msgspec.Struct, frozen=True, array_like=True):
    """Something that happened to a request, and when, in seconds of the scheduler's clock."""

    name: str  # queued | ready (what it was held for) | scheduled | preempted | resumed | first_token | finished
    at: float


class RequestUpdate(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """What is new about a request since its last update."""

    request_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()  # one a token, where asked for
    prompt_logprobs: Sequence[TokenLogprob] = ()  # all but the first prompt token, once the prompt is computed
    finish_reason: str | None = None
    stop_reason: int | None = None  # the stop token that ended it, where it was not the model's own
    error: str | None = None
    pooled: Sequence[Any] = ()  # of the prompt's hidden states, where asked for: one vector, or one a token
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    events: Sequence[RequestEvent] = ()


class DecodedTokens(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """One more token each of requests that have no other news: what most of a step's rows have to tell."""

    request_ids: list[str]
    token_ids: list[int]


Update = RequestUpdate | DecodedTokens


class Request:
    """A sequence of tokens that is computed and grows.

    ``num_known`` counts the tokens that exist or are being sampled in steps under way; ``num_computed`` those
    whose keys and values are in the cache once the steps under way have ended. A request without uncomputed
    tokens waits for its step. Everything else follows from these two numbers.
    """

    __slots__ = (  # a step reads several of each row's: slots are found soonest
        "adapter_id", "arrival", "cache_salt", "deadline", "decodes_until", "drafts", "embeds",
        "eos_token_ids", "events", "final_only", "finish_reason", "fork_of", "grows_until", "hashes", "id",
        "max_total", "media", "num_cached", "num_computed", "num_confirmed", "num_known", "num_prompt",
        "order", "pooled", "pooling", "priority", "prompt_logprobs", "sampling", "slot", "state", "stop_ids",
        "tables", "tenant", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_token_ids: Sequence[int] = (),
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        adapter_id: int = 0,
        cache_salt: str = "",
        media: Sequence[tuple[int, str]] = (),
        held: RequestState | None = None,
        fork_of: str | None = None,
        pooling: str = "",
        final_only: bool = False,
        embeds: PromptEmbeds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A request as the door has checked it.

        Args:
            priority: lower runs first.
            deadline: in seconds of the scheduler's clock.
            media: (position of its first placeholder token, content hash) of each image or sound.
            held: the state to start in, where something must be ready first.
            fork_of: the id of the request that computes the same prompt.
            pooling: last | mean | all: what to return of the prompt's hidden states, without an answer.
            final_only: tell nothing before the end, and then everything; not with logprobs.
            embeds: stand in place of the prompt's tokens, whose ids say nothing then.
        """
        self.id = request_id
        self.sampling = sampling
        self.eos_token_ids = list(eos_token_ids)
        self.priority = priority
        self.tenant = tenant
        self.deadline = deadline
        self.adapter_id = adapter_id
        self.cache_salt = cache_salt
        self.media = sorted(media)
        self.fork_of = fork_of
        self.pooling = pooling
        self.final_only = final_only
        self.embeds = embeds
        self.arrival = clock()
        self.order = 0  # the scheduler's running number, ties of arrival included

        self.token_ids = list(prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_known = self.num_prompt
        self.num_computed = 0
        self.num_confirmed = 0  # computed by steps that have ended: safe to share
        self.num_cached = -1  # prompt tokens hit at the first admission; -1 before it
        self.max_total = self.num_prompt + (sampling.max_tokens or 0)  # the scheduler caps it by the context
        self.stop_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self.stop_ids |= frozenset(self.eos_token_ids)

        self.slot = -1
        self.tables: list[list[int]] = []  # one block table a KV group
        self.hashes: list[bytes] = []  # root, then one a full block, as far as they were needed
        self.drafts: list[int] = []
        self.decodes_until = 0  # known tokens up to which the scheduler has nothing but the next one to plan,
        self.grows_until = 0  # or but one more block for it in each KV group
        self.prompt_logprobs: list[TokenLogprob] = []
        self.pooled: list[Any] = []

        self.finish_reason: FinishReason | None = None
        self.events = [RequestEvent("queued", self.arrival)]
        self.state = held or (RequestState.WAITING_FORK if fork_of else RequestState.WAITING)

    def move_to(self, state: RequestState) -> None:
        """The only place that assigns ``self.state`` after the start; a state with no way out is final."""
        if state not in NEXT_STATES[self.state]:
            raise IllegalTransition(f"request {self.id}: {self.state.value} -> {state.value}")
        self.state = state

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are here: the prompt and what has been generated."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return self.num_known - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def needs_whole_prompt(self) -> bool:
        """Something is wanted of every position of the prompt, so none may come out of the cache."""
        return self.wants_prompt_logprobs or self.pooling in ("mean", "all")

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None

    def happened(self, name: str, at: float) -> None:
        self.events.append(RequestEvent(name, at))

    def take_events(self) -> list[RequestEvent]:
        events, self.events = self.events, []
        return events
