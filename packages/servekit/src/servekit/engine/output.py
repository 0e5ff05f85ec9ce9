"""From the core's news to what callers see: text, logprobs and how each answer ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from servekit.core.plan import TokenLogprob
from servekit.core.request import RequestEvent, RequestUpdate
from servekit.engine.detokenizer import StopStrings, detokenizer_for
from servekit.engine.tokenizer import Tokenizer
from servekit.engine.tracing import RequestTracer
from servekit.engine.validate import EngineRequest


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` answers: everything so far, and what the last update added."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None  # one a token, where asked for
    finish_reason: str | None = None  # stop | length | abort | timeout | error
    stop_reason: int | str | None = None  # the stop token or string that ended it
    error: str | None = None
    delta_text: str = ""
    delta_token_ids: list[int] = field(default_factory=list)
    delta_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        entries = self.logprobs or []
        return sum(entry.logprob for entry in entries) / max(len(entries), 1)


@dataclass(slots=True)
class RequestOutput:
    """A request and its answers; ``outputs`` holds those that have moved, all of them once it is finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprob] | None = None  # of all prompt tokens but the first
    num_cached_tokens: int = 0
    events: list[RequestEvent] = field(default_factory=list)
    pooled: list[Any] = field(default_factory=list)  # a vector of the prompt, or one a token, where asked for


class _Sequence:
    """One answer in the making."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: Tokenizer) -> None:
        params = request.sampling
        self.params = params
        wanted = params.logprobs is not None or request.num_sequences > params.n  # best_of chooses by them
        self.output = CompletionOutput(index, logprobs=[] if wanted else None)
        self.is_over = False  # its last update is being told, or has been
        self._stop = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._pieces: list[str] = []
        self._only_tokens = not params.detokenize and not wanted
        if params.detokenize:
            self._detokenizer = detokenizer_for(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._is_plain = params.detokenize and not wanted and not params.stop

    def add(self, update: RequestUpdate) -> bool:
        """Take in new tokens; True where a stop string ends the answer before the core did."""
        output = self.output
        if self._is_plain and update.finish_reason is None:
            add = self._detokenizer.add
            for token in update.token_ids:
                output.token_ids.append(token)
                output.delta_token_ids.append(token)
                output.delta_text += add(token)
            return False
        if self._only_tokens:
            output.token_ids += update.token_ids
            output.delta_token_ids += update.token_ids
            if update.finish_reason is None:
                return False
        for index, token in enumerate(() if self._only_tokens else update.token_ids):
            self._add_token(token, update.logprobs[index] if update.logprobs else None)
            if self._stop.found is not None:
                output.finish_reason, output.stop_reason = "stop", self._stop.found
                break
        stopped = self._stop.found is not None and update.finish_reason is None
        if self._stop.found is None and update.finish_reason:
            output.finish_reason, output.stop_reason = update.finish_reason, update.stop_reason
            output.error = update.error
            if self.params.detokenize:
                output.delta_text += self._stop.add(self._detokenizer.finish())
            if self._stop.found is not None:
                output.finish_reason, output.stop_reason = "stop", self._stop.found
            output.delta_text += self._stop.finish()
        return stopped

    def settle(self) -> None:
        """What was added has been told: the next update begins anew."""
        output = self.output
        self._pieces.append(output.delta_text)
        output.delta_text, output.delta_token_ids = "", []
        if output.delta_logprobs:
            output.delta_logprobs = []

    def _add_token(self, token: int, logprob: TokenLogprob | None) -> None:
        output = self.output
        output.token_ids.append(token)
        output.delta_token_ids.append(token)
        if logprob is not None and output.logprobs is not None:
            output.logprobs.append(logprob)
            output.delta_logprobs.append(logprob)
        if not self.params.detokenize:
            return
        may_stop = len(output.token_ids) >= self.params.min_tokens
        output.delta_text += self._stop.add(self._detokenizer.add(token), may_stop=may_stop)

    def snapshot(self) -> CompletionOutput:
        """A copy that later updates leave alone."""
        made = self.output
        return CompletionOutput(
            made.index,
            "".join(self._pieces) + made.delta_text,
            list(made.token_ids),
            None if made.logprobs is None else list(made.logprobs),
            made.finish_reason,
            made.stop_reason,
            made.error,
            made.delta_text,
            made.delta_token_ids,
            made.delta_logprobs,
        )


class RequestTracker:
    """One request's answers, from its first token to its last.

    Args:
        is_live: what is shown is the answers themselves, for whoever reads them at once: without ``text``, and nothing
            is copied.
    """

    def __init__(
        self, request: EngineRequest, prompt: str | None, tokenizer: Tokenizer, *, is_live: bool = False
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.sequences = [_Sequence(i, request, tokenizer) for i in range(request.num_sequences)]
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._cached = 0
        self._events: list[RequestEvent] = []
        self._pooled: list[Any] = []
        self._live = self._output([]) if is_live and not self._picks_best else None

    @property
    def finished(self) -> bool:
        return all(sequence.is_over for sequence in self.sequences)

    @property
    def _picks_best(self) -> bool:
        return self.request.num_sequences > self.request.sampling.n

    def add(self, sequence: _Sequence, update: RequestUpdate) -> bool:
        """Take in one sequence's news; True where the core must end that sequence."""
        if update.prompt_logprobs:
            self._prompt_logprobs = list(update.prompt_logprobs)
        if update.events:
            self._cached = max(self._cached, update.num_cached_tokens)
            self._events += update.events
        if update.pooled:
            self._pooled = list(update.pooled)
        return sequence.add(update)

    def shown(self, sequence: _Sequence) -> RequestOutput | None:
        """What a caller sees after news of ``sequence``; nothing before the end where the best are picked."""
        live = self._live
        if live is not None:
            live.outputs = [sequence.output]
            if sequence.is_over:
                live.finished = self.finished
            if self._events:
                live.num_cached_tokens, live.events, live.pooled = self._cached, self._events, self._pooled
                live.prompt_logprobs = self._wanted_prompt_logprobs()
            return live
        if not self._picks_best:
            return self._output([sequence.snapshot()])
        return self._output([best.snapshot() for best in self._best()]) if self.finished else None

    def _best(self) -> Sequence[_Sequence]:
        ranked = sorted(self.sequences, key=lambda s: -s.output.mean_logprob)[: self.request.sampling.n]
        for index, sequence in enumerate(ranked):
            sequence.output.index = index
        return ranked

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            self.request.request_id,
            self.prompt,
            self.request.prompt_token_ids,
            outputs,
            self.finished,
            self._wanted_prompt_logprobs(),
            self._cached,
            list(self._events),
            self._pooled,
        )

    def _wanted_prompt_logprobs(self) -> list[TokenLogprob] | None:
        return None if self.request.sampling.prompt_logprobs is None else self._prompt_logprobs or []

    def trace(self, tracer: RequestTracer) -> None:
        """Tell ``tracer`` how the request went; answers that nobody waited for were aborted."""
        tracer.ended(
            self.request,
            self._events,
            num_output_tokens=sum(len(sequence.output.token_ids) for sequence in self.sequences),
            num_cached_tokens=self._cached,
            finish_reasons=[sequence.output.finish_reason or "abort" for sequence in self.sequences],
        )

    def final(self) -> RequestOutput:
        """All answers, whole."""
        shown = self._best() if self._picks_best else self.sequences
        return self._output([sequence.snapshot() for sequence in shown])


class OutputProcessor:
    """The requests that somebody waits for."""

    def __init__(self, tokenizer: Tokenizer, tracer: RequestTracer | None = None) -> None:
        self._tokenizer = tokenizer
        self._tracer = tracer
        self.trackers: dict[str, RequestTracker] = {}
        self._sequences: dict[str, tuple[RequestTracker, _Sequence]] = {}  # by the core's ids, as long as they run

    def add(self, request: EngineRequest, prompt: str | None, *, is_live: bool = False) -> RequestTracker:
        tracker = RequestTracker(request, prompt, self._tokenizer, is_live=is_live)
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

    def process(
        self, updates: Sequence[RequestUpdate], look: Callable[[RequestOutput], None] | None = None
    ) -> list[str]:
        """Take in what came, and return the ids of sequences that a stop string ended.

        Updates of one sequence become one output. News of forgotten requests are dropped, and those of sequences that
        went on for a step after a stop string.

        Args:
            look: is shown each sequence that moved; None where nobody looks before the end.
        """
        ended: list[str] = []
        moved: dict[str, tuple[RequestTracker, _Sequence]] = {}
        for update in updates:
            found = self._sequences.get(update.request_id)
            if found is None or found[1].output.finish_reason is not None:
                continue
            moved[update.request_id] = found
            if found[0].add(found[1], update):
                ended.append(update.request_id)
        for sequence_id, (tracker, sequence) in moved.items():
            sequence.is_over = sequence.output.finish_reason is not None
            output = tracker.shown(sequence) if look is not None else None
            if look is not None and output is not None:
                look(output)
            sequence.settle()
            if sequence.is_over:
                self._end(sequence_id, tracker)
        return ended

    def _end(self, sequence_id: str, tracker: RequestTracker) -> None:
        if self._sequences.pop(sequence_id, None) is not None and tracker.finished:
            self.trackers.pop(tracker.request.request_id, None)
            self._trace(tracker)
