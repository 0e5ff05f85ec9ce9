"""From the core's news to what callers see: text, logprobs and how each answer ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from servekit.core.plan import TokenLogprob
from servekit.core.request import DecodedTokens, RequestEvent, RequestUpdate, Update
from servekit.engine.detokenizer import ByteDetokenizer, StopStrings, detokenizer_for
from servekit.engine.tokenizer import Tokenizer
from servekit.engine.tracing import RequestTracer
from servekit.engine.validate import EngineRequest
from servekit.sampling.parameters import SamplingParams


@dataclass(slots=True)
class _Parts:
    """An answer as it grows; what is there never changes."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class CompletionOutput(msgspec.Struct, eq=False, gc=False):
    """One of the ``n`` answers as it was when it was taken: everything so far, and what came since it was taken before.

    Whatever grows with the answer is put together when it is asked for.
    """

    index: int
    num_tokens: int
    _num_texts: int
    _first_token: int  # of the delta
    _first_text: int
    _parts: _Parts
    finish_reason: str | None = None  # stop | length | abort | timeout | error
    stop_reason: int | str | None = None  # the stop token or string that ended it
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._parts.texts[: self._num_texts])

    @property
    def token_ids(self) -> list[int]:
        return self._parts.token_ids[: self.num_tokens]

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One a token; None where they were not asked for."""
        found = self._parts.logprobs
        return None if found is None else found[: self.num_tokens]

    @property
    def delta_text(self) -> str:
        return "".join(self._parts.texts[self._first_text : self._num_texts])

    @property
    def delta_token_ids(self) -> list[int]:
        return self._parts.token_ids[self._first_token : self.num_tokens]

    @property
    def delta_logprobs(self) -> list[TokenLogprob]:
        return (self._parts.logprobs or [])[self._first_token : self.num_tokens]

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={self.text!r}, token_ids={self.token_ids}, "
            f"finish_reason={self.finish_reason!r}, stop_reason={self.stop_reason!r})"
        )


class RequestOutput(msgspec.Struct, eq=False, gc=False):
    """A request and its answers; ``outputs`` holds those that have moved, all of them once it is finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprob] | None = None  # of all prompt tokens but the first
    num_cached_tokens: int = 0
    events: Sequence[RequestEvent] = ()
    pooled: list[Any] = []  # a vector of the prompt, or one a token, where asked for


class _Sequence:
    """One answer in the making."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: Tokenizer) -> None:
        params = request.sampling
        wants_logprobs = params.logprobs is not None or request.num_sequences > params.n  # best_of chooses by them
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.has_news = False
        self.parts = _Parts(logprobs=[] if wants_logprobs else None)
        self.text_of = _TextOf(params, tokenizer) if params.detokenize else None
        self.quick_text = self.text_of.quick if self.text_of else None
        self._taken_tokens = 0
        self._taken_texts = 0

    @property
    def mean_logprob(self) -> float:
        entries = self.parts.logprobs or []
        return sum(entry.logprob for entry in entries) / max(len(entries), 1)

    def take_text(self) -> tuple[str, int]:
        """What ``take`` would say is new, where that is nothing but text, and the number of its tokens."""
        parts = self.parts
        first_token, first_text = self._taken_tokens, self._taken_texts
        self._taken_tokens, self._taken_texts = num_tokens, num_texts = len(parts.token_ids), len(parts.texts)
        self.has_news = False
        if num_texts - first_text == 1:
            return parts.texts[first_text], num_tokens - first_token
        return "".join(parts.texts[first_text:]), num_tokens - first_token

    def add_token(self, token: int) -> bool:
        """True where a stop string ends the answer with ``token``."""
        token_ids = self.parts.token_ids
        token_ids.append(token)
        if self.text_of is None:
            return False
        text = self.text_of.add(token, len(token_ids))
        if text:
            self.parts.texts.append(text)
        if self.text_of.stop is None:
            return False
        self.finish_reason, self.stop_reason = "stop", self.text_of.stop
        return True

    def add(self, update: RequestUpdate) -> bool:
        """Take in an update; True where a stop string ends the answer before the core did."""
        for index, token in enumerate(update.token_ids):
            if update.logprobs and self.parts.logprobs is not None:
                self.parts.logprobs.append(update.logprobs[index])
            if self.add_token(token):
                return update.finish_reason is None
        if update.finish_reason is not None:
            self._end(update)
        return False

    def _end(self, update: RequestUpdate) -> None:
        self.finish_reason, self.stop_reason, self.error = update.finish_reason, update.stop_reason, update.error
        if self.text_of is None:
            return
        text = self.text_of.finish()
        if text:
            self.parts.texts.append(text)
        if self.text_of.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self.text_of.stop

    def take(self) -> CompletionOutput:
        """The answer as it is; what comes later leaves it alone."""
        parts = self.parts
        first_token, first_text = self._taken_tokens, self._taken_texts
        self._taken_tokens, self._taken_texts = num_tokens, num_texts = len(parts.token_ids), len(parts.texts)
        self.has_news = False
        if self.finish_reason is None:
            return CompletionOutput(self.index, num_tokens, num_texts, first_token, first_text, parts)
        ended = (self.finish_reason, self.stop_reason, self.error)
        return CompletionOutput(self.index, num_tokens, num_texts, first_token, first_text, parts, *ended)


class _TextOf:
    """The text of an answer's tokens, up to a stop string."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._min_tokens = params.min_tokens
        self._looks_for_stops = bool(params.stop)
        detokenizer = detokenizer_for(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._detokenizer = detokenizer
        self._stop = StopStrings(params.stop, include=params.include_stop_str_in_output)
        # A token's text, where that takes no more than a look.
        self.quick = detokenizer.text_of if isinstance(detokenizer, ByteDetokenizer) and not params.stop else None

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        return self._stop.found

    def add(self, token: int, num_tokens: int) -> str:
        """What is certain now; ``num_tokens`` counts ``token``."""
        text = self._detokenizer.add(token)
        return self._stop.add(text, may_stop=num_tokens >= self._min_tokens) if self._looks_for_stops else text

    def finish(self) -> str:
        text = self._stop.add(self._detokenizer.finish())
        return text + self._stop.finish()


class RequestTracker:
    """One request's answers, from its first token to its last."""

    def __init__(self, request: EngineRequest, prompt: str | None, tokenizer: Tokenizer) -> None:
        self.request = request
        self.prompt = prompt
        self.sequences = [_Sequence(i, request, tokenizer) for i in range(request.num_sequences)]
        self.moved: list[_Sequence] = []  # since an output was taken
        self._is_many = len(self.sequences) > 1
        self._picks_best = request.num_sequences > request.sampling.n
        self._prompt_logprobs: list[TokenLogprob] | None = None if request.sampling.prompt_logprobs is None else []
        self._cached = 0
        self._events: tuple[RequestEvent, ...] = ()
        self._pooled: list[Any] = []
        self.num_running = len(self.sequences)

    @property
    def finished(self) -> bool:
        return not self.num_running

    def add(self, sequence: _Sequence, update: RequestUpdate) -> bool:
        """Take in one sequence's news; True where the core must end that sequence."""
        if update.prompt_logprobs and self._prompt_logprobs is not None:
            self._prompt_logprobs = list(update.prompt_logprobs)
        if update.events:
            self._cached = max(self._cached, update.num_cached_tokens)
            self._events += tuple(update.events)
        if update.pooled:
            self._pooled = list(update.pooled)
        return sequence.add(update)

    def take(self) -> RequestOutput | None:
        """What has moved since it was last asked for; None where nothing is to be shown.

        Where the best are picked that is nothing before the end.
        """
        moved = self.moved
        if not moved or (self._picks_best and self.num_running):
            return None
        self.moved = []
        return self._output([sequence.take() for sequence in (self._best() if self._picks_best else moved)])

    def take_text(self) -> tuple[str, int] | None:
        """The text that is new and of how many tokens it is; None where that is not all there is to be taken."""
        if self._is_many or not self.num_running or not self.moved:
            return None
        self.moved.clear()
        return self.sequences[0].take_text()

    def _best(self) -> Sequence[_Sequence]:
        ranked = sorted(self.sequences, key=lambda s: -s.mean_logprob)[: self.request.sampling.n]
        for index, sequence in enumerate(ranked):
            sequence.index = index
        return ranked

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            self.request.request_id,
            self.prompt,
            self.request.prompt_token_ids,
            outputs,
            not self.num_running,
            self._prompt_logprobs,
            self._cached,
            self._events,
            self._pooled,
        )

    def trace(self, tracer: RequestTracer) -> None:
        """Tell ``tracer`` how the request went; answers that nobody waited for were aborted."""
        tracer.ended(
            self.request,
            self._events,
            num_output_tokens=sum(len(sequence.parts.token_ids) for sequence in self.sequences),
            num_cached_tokens=self._cached,
            finish_reasons=[sequence.finish_reason or "abort" for sequence in self.sequences],
        )

    def abort(self) -> None:
        """The answers that have not ended are cut off where they are."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                if not sequence.has_news:
                    sequence.has_news = True
                    self.moved.append(sequence)
        self.num_running = 0

    def final(self) -> RequestOutput:
        """All answers, whole."""
        return self._output([sequence.take() for sequence in (self._best() if self._picks_best else self.sequences)])


class OutputProcessor:
    """The requests that somebody waits for."""

    def __init__(self, tokenizer: Tokenizer, tracer: RequestTracer | None = None) -> None:
        self._tokenizer = tokenizer
        self._tracer = tracer
        self.trackers: dict[str, RequestTracker] = {}
        self._sequences: dict[str, tuple[RequestTracker, _Sequence]] = {}  # by the core's ids, as long as they run

    def add(self, request: EngineRequest, prompt: str | None) -> RequestTracker:
        tracker = RequestTracker(request, prompt, self._tokenizer)
        self.trackers[request.request_id] = tracker
        for index, sequence in enumerate(tracker.sequences):
            self._sequences[request.child_id(index)] = (tracker, sequence)
        return tracker

    def _trace(self, tracker: RequestTracker) -> None:
        if self._tracer is not None:
            tracker.trace(self._tracer)

    def forget(self, request_id: str) -> list[str]:
        """Nobody waits any more: the ids of the sequences that the core should end."""
        tracker = self.trackers.pop(request_id, None)
        if tracker is None:
            return []
        self._trace(tracker)
        children = [tracker.request.child_id(index) for index in range(len(tracker.sequences))]
        return [child for child in children if self._sequences.pop(child, None)]

    def clear(self) -> None:
        """Nobody waits for anything any more."""
        self.trackers.clear()
        self._sequences.clear()

    def process(self, updates: Sequence[Update]) -> tuple[list[RequestTracker], list[str]]:
        """The requests of which something can be taken now, and the ids of sequences that a stop string ended.

        A request that was not taken from since it was named is named again when it is finished.

        News of forgotten requests are dropped, and those of sequences that went on for a step after a stop string.
        """
        moved: list[RequestTracker] = []
        stopped: list[str] = []
        for update in updates:
            if isinstance(update, DecodedTokens):
                self._add_tokens(update, moved, stopped)
                continue
            found = self._sequences.get(update.request_id)
            if found is not None:
                tracker, sequence = found
                if tracker.add(sequence, update):
                    stopped.append(update.request_id)
                self._moved(update.request_id, tracker, sequence, moved)
        return moved, stopped

    def _add_tokens(self, decoded: DecodedTokens, moved: list[RequestTracker], stopped: list[str]) -> None:
        """One token each, for most requests of a step."""
        sequences = self._sequences
        for request_id, token in zip(decoded.request_ids, decoded.token_ids, strict=True):
            found = sequences.get(request_id)
            if found is None:
                continue
            tracker, sequence = found
            quick = sequence.quick_text
            if quick is not None and (text := quick(token)) is not None:
                sequence.parts.token_ids.append(token)
                if text:
                    sequence.parts.texts.append(text)
            elif sequence.text_of is None:
                sequence.parts.token_ids.append(token)
            elif sequence.add_token(token):
                stopped.append(request_id)
                self._moved(request_id, tracker, sequence, moved)
                continue
            if not sequence.has_news:
                sequence.has_news = True
                if not tracker.moved:
                    moved.append(tracker)
                tracker.moved.append(sequence)

    def _moved(
        self, request_id: str, tracker: RequestTracker, sequence: _Sequence, moved: list[RequestTracker]
    ) -> None:
        if not sequence.has_news:
            sequence.has_news = True
            if not tracker.moved:
                moved.append(tracker)
            tracker.moved.append(sequence)
        if sequence.finish_reason is not None:
            del self._sequences[request_id]
            tracker.num_running -= 1
            if tracker.finished:
                moved.append(tracker)
                del self.trackers[tracker.request.request_id]
                self._trace(tracker)
