"""From logits to tokens, for a whole batch at once.

The order, which vLLM's users know: masks (allowed tokens, bad words, min_tokens, grammar), logit_bias, penalties,
temperature, min-p, top-k, top-p, typical. Logprobs are of the model's own distribution, before any of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common_platform.errors import PlatformError
from servekit.core.plan import TokenLogprob
from servekit.execution import sampling_ops as ops
from servekit.execution.logits_processors import Factory, LogitsProcessor, make_processors
from servekit.kernels.argmax import argmax_for
from servekit.kernels.paged_attention.metadata import to_device
from servekit.layers.kernels import Sample
from servekit.sampling.parameters import SamplingParams

NO_TOKEN = -1


class Grammar(Protocol):
    """What a structured output allows next: ``servekit.sampling.structured.matcher.GrammarState``."""

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Set bit i of word j of ``row`` ``[ceil(vocab / 32)]`` where token 32 * j + i is allowed."""

    def accept(self, tokens: Sequence[int]) -> bool:
        """Move on by ``tokens``; False where one is not allowed."""

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where there is a choice."""


@dataclass(slots=True)
class SampleOutput:
    """``token_ids`` in the order of the slots asked for, ``NO_TOKEN`` for those in ``errors``."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class SamplerRow:
    """What the sampler remembers of one request."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: list[int]
    banned_early: list[int]  # until min_tokens are out
    seed: int
    grammar: Grammar | None
    processors: list[LogitsProcessor]
    counts: Tensor | None = None  # [vocab] float32, of the output
    in_prompt: Tensor | None = None  # [vocab] bool
    failure: str = ""  # why no token can be sampled for it

    @property
    def is_special(self) -> bool:
        """Whether anything but the most likely token is ever asked for, or what came before matters."""
        p = self.params
        return bool(self.edits or self.counts is not None or p.logprobs is not None or not p.is_greedy)

    @property
    def edits(self) -> bool:
        """Whether its logits need work that is done row by row."""
        p = self.params
        return bool(
            p.logit_bias
            or p.allowed_token_ids
            or p.bad_words_token_ids
            or self.grammar
            or self.processors
            or self.failure
            or len(self.output_ids) < p.min_tokens
        )


class Sampler:
    """Parameters of all slots in arrays that are updated in place; one row a request.

    Args:
        kernel: ``servekit.kernels.sample`` of the device; None draws by torch's operations, with other random numbers.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device | str = "cpu",
        kernel: Sample | None = None,
        processors: Sequence[Factory] = (),
    ) -> None:
        """Args: processors: logits processors of every request, beside those that it names."""
        self._kernel = kernel
        self._processors = processors
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._argmax = argmax_for(self.device)
        self._rows: dict[int, SamplerRow] = {}
        self._special: set[int] = set()  # slots that want more than their most likely token
        self._grammars: set[int] = set()
        self._columns = {
            name: np.full(max_num_seqs, neutral, np.float32)
            for name, neutral in (
                ("temperature", 0.0),
                ("top_p", 1.0),
                ("min_p", 0.0),
                ("typical_p", 1.0),
                ("presence_penalty", 0.0),
                ("frequency_penalty", 0.0),
                ("repetition_penalty", 1.0),
            )
        }
        self._top_k = np.full(max_num_seqs, vocab_size, np.int64)

    def add_row(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        grammar: Grammar | None = None,
    ) -> None:
        """A request takes ``slot``.

        Args:
            output_ids: what it generated before a preemption.
            grammar: a state of its own, at the start of the output.

        Raises:
            RequestError: ``params`` name a logits processor that is not registered.
        """
        for name, column in self._columns.items():
            column[slot] = getattr(params, name)
        if params.is_greedy:
            self._columns["temperature"][slot] = 0.0
        self._top_k[slot] = params.top_k if params.top_k > 0 else self.vocab_size
        row = SamplerRow(
            params,
            prompt_ids,
            list(output_ids),
            [*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)],
            ops.seed_of(params.seed),
            grammar,
            make_processors(params, self._processors),
        )
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            row.counts = ops.count_tokens(row.output_ids, self.vocab_size, self.device)
            row.in_prompt = ops.count_tokens(prompt_ids, self.vocab_size, self.device) > 0
        if grammar is not None and not grammar.accept(row.output_ids):
            row.failure = "the grammar does not allow what was generated before"
        self._rows[slot] = row
        if row.is_special:
            self._special.add(slot)
        if grammar is not None:
            self._grammars.add(slot)

    def remove_row(self, slot: int) -> None:
        del self._rows[slot]
        self._special.discard(slot)
        self._grammars.discard(slot)

    @property
    def has_grammars(self) -> bool:
        return bool(self._grammars)

    def forced(self, slot: int) -> list[int]:
        """The tokens that the grammar of ``slot`` leaves no choice about; empty without one."""
        grammar = self._rows[slot].grammar
        return grammar.forced() if grammar else []

    def is_plain(self, slots: Sequence[int]) -> bool:
        """Whether the device can draw for all ``slots`` alone: nothing of what came before matters to them."""
        if self._kernel is None:
            return False
        rows = [self._rows[slot] for slot in slots if slot in self._special]
        return not any(
            row.edits or row.counts is not None or row.params.logprobs is not None or row.params.typical_p < 1
            for row in rows
        )

    def draw_unseen(self, logits: Tensor, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A token for each of some plain slots, which the host need not know; ``[len(slots)]``, and the highest logits.

        A row whose highest logit is not finite has no token.
        """
        tokens, highest = self._by_kernel(logits, np.asarray(slots), [self._rows[slot] for slot in slots])
        for slot in slots:
            self._rows[slot].output_ids.append(NO_TOKEN)  # only their number matters to plain rows
        return tokens, highest

    def _by_kernel(
        self, logits: Tensor, slots: np.ndarray, rows: Sequence[SamplerRow], *, is_limited: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``is_limited``: temperature and limits have been applied to ``logits`` already."""
        if self._kernel is None:
            raise RuntimeError("there is no sampling kernel on this device")
        floats = np.stack([self._columns[name][slots] for name in ("temperature", "top_p", "min_p")])
        top_k = np.minimum(self._top_k[slots], self.vocab_size)
        if is_limited:
            floats[:] = [[1.0], [1.0], [0.0]]
            top_k = np.full(len(slots), self.vocab_size)
        seeds = [ops.counter_seed(row.seed, len(row.output_ids)) for row in rows]
        temperature, top_p, min_p = to_device(floats, self.device)
        whole = to_device(np.stack([np.asarray(seeds, np.uint64).view(np.int64), top_k]), self.device)
        return self._kernel(logits, temperature, whole[1].to(torch.int32), top_p, min_p, whole[0].contiguous())

    def sample(self, logits: Tensor, slots: Sequence[int]) -> SampleOutput:
        """One token for each slot.

        Args:
            logits: ``[len(slots), vocab]`` float32, as the model made them; not changed.
        """
        if not self._special:
            highest, greedy = self._argmax(logits)
            if math.isfinite(float(highest.sum())):  # then all of them are
                return SampleOutput(greedy.tolist())
        return self._sample(logits, slots)

    def _sample(self, logits: Tensor, slots: Sequence[int]) -> SampleOutput:
        rows = [self._rows[slot] for slot in slots]
        errors: dict[int, str] = {}
        raw = logits
        logits = self._edited(logits, slots, rows, errors)
        logits = self._penalised(logits, slots, rows)
        highest, greedy = self._argmax(logits)
        tokens = self._drawn(logits, np.asarray(slots), rows, greedy).tolist()
        self._find_broken(raw, highest, tokens, slots, errors)
        output = SampleOutput(tokens, errors=errors)
        self._accept(output, slots, rows)
        output.logprobs = self._logprobs(raw, output, slots, rows)
        return output

    def _find_broken(
        self, raw: Tensor, highest: Tensor, tokens: Sequence[int], slots: Sequence[int], errors: dict[int, str]
    ) -> None:
        """Errors for rows whose logits are no numbers, whose masks leave no token, or whose draw found none."""
        model = torch.isfinite(raw.amax(dim=-1)).tolist()
        left = torch.isfinite(highest).tolist()
        for slot, is_number, has_token, token in zip(slots, model, left, tokens, strict=True):
            if not is_number:
                errors.setdefault(slot, "no token can follow: the model's output is not a number")
            elif not has_token:
                errors.setdefault(slot, "no token can follow: this request's own limits leave none")
            elif not 0 <= token < self.vocab_size:  # it must not reach the next step, which is everybody's
                errors.setdefault(slot, "no token can follow: this request's own parameters leave none to draw")

    def _edited(self, logits: Tensor, slots: Sequence[int], rows: list[SamplerRow], errors: dict[int, str]) -> Tensor:
        """A copy with the masks and biases of the rows that have some; a row whose own edits fail gets an error."""
        editing = [i for i, row in enumerate(rows) if row.edits]
        if not editing:
            return logits
        logits = logits.clone()
        for i in editing:
            if rows[i].failure:
                errors[slots[i]] = rows[i].failure
                continue
            try:
                logits[i] = ops.edit_row(logits[i], rows[i])
            except Exception as error:  # noqa: BLE001 - one request's own processors and grammar: it alone ends
                errors[slots[i]] = _told(error, "logits")
        return logits

    def _penalised(self, logits: Tensor, slots: Sequence[int], rows: list[SamplerRow]) -> Tensor:
        index = [i for i, row in enumerate(rows) if row.counts is not None]
        if not index:
            return logits
        counts = torch.stack([rows[i].counts for i in index])  # type: ignore[misc]
        in_prompt = torch.stack([rows[i].in_prompt for i in index])  # type: ignore[misc]
        at = [slots[i] for i in index]
        presence, frequency, repetition = (
            self._column(name, at) for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
        )
        out = logits.clone()
        out[index] = ops.penalise(logits[index], counts, in_prompt, presence, frequency, repetition)
        return out

    def _column(self, name: str, slots: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(self._columns[name][slots])[:, None].to(self.device)

    def _drawn(self, logits: Tensor, slots: np.ndarray, rows: list[SamplerRow], greedy: Tensor) -> Tensor:
        """Greedy rows keep their most likely token, the others draw."""
        drawing = np.flatnonzero(self._columns["temperature"][slots] > 0)
        if not len(drawing):
            return greedy
        at = slots[drawing]
        chosen = logits if len(drawing) == len(slots) else logits[torch.from_numpy(drawing).to(self.device)]
        drawn = [rows[i] for i in drawing]
        if self._kernel is not None and not (self._columns["typical_p"][at] < 1).any():
            return self._placed(greedy, drawing, self._by_kernel(chosen, at, drawn)[0])
        chosen = chosen / self._column("temperature", at)
        if (self._columns["min_p"][at] > 0).any():
            chosen = ops.keep_min_p(chosen, self._column("min_p", at))
        top_k, top_p = self._top_k[at], self._columns["top_p"][at]
        if (top_k < self.vocab_size).any() or (top_p < 1).any():
            chosen = ops.keep_top(chosen, torch.from_numpy(top_k).to(self.device), self._column("top_p", at))
        if (self._columns["typical_p"][at] < 1).any():
            chosen = ops.keep_typical(chosen, self._column("typical_p", at))
        if self._kernel is not None:
            return self._placed(greedy, drawing, self._by_kernel(chosen, at, drawn, is_limited=True)[0])
        uniforms = [ops.uniform(row.seed, len(row.output_ids)) for row in drawn]
        found = ops.draw(chosen, torch.tensor(uniforms, dtype=torch.float64, device=self.device))
        return self._placed(greedy, drawing, found)

    def _placed(self, greedy: Tensor, drawing: NDArray[np.int64], drawn: Tensor) -> Tensor:
        tokens = greedy.clone()
        tokens[torch.from_numpy(drawing).to(self.device)] = drawn
        return tokens

    def _accept(self, output: SampleOutput, slots: Sequence[int], rows: list[SamplerRow]) -> None:
        for index, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            token = output.token_ids[index]
            if slot not in output.errors and row.grammar:
                try:
                    if not row.grammar.accept([token]):
                        output.errors[slot] = "this request's grammar refused its own token"
                except Exception as error:  # noqa: BLE001 - this request's own grammar: it alone ends
                    output.errors[slot] = _told(error, "grammar")
            if slot in output.errors:
                output.token_ids[index] = NO_TOKEN
                continue
            row.output_ids.append(token)
            if row.counts is not None:
                row.counts[token] += 1

    def _logprobs(
        self, raw: Tensor, output: SampleOutput, slots: Sequence[int], rows: list[SamplerRow]
    ) -> dict[int, TokenLogprob]:
        wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None and slots[i] not in output.errors]
        if not wanted:
            return {}
        counts = [rows[i].params.logprobs or 0 for i in wanted]
        entries = token_logprobs(raw[wanted], [output.token_ids[i] for i in wanted], counts)
        return {slots[i]: entry for i, entry in zip(wanted, entries, strict=True)}

    @staticmethod
    def prompt_logprobs(logits: Tensor, target_ids: Sequence[int], top_k: int) -> list[TokenLogprob]:
        """Entries for prompt positions: ``logits`` ``[positions, vocab]`` and the token that stands after each."""
        return token_logprobs(logits, target_ids, [top_k] * len(target_ids))


def _told(error: Exception, place: str) -> str:
    """Our own sentence; of a plugin's error only its kind, for the text may hold what is not the caller's."""
    return error.message if isinstance(error, PlatformError) else f"{type(error).__name__} in this request's {place}"


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """The logprob and rank of each row's token, and its ``top[i]`` most likely ones."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    most = max(top)
    values, ids = logprobs.topk(most) if most else (logprobs[:, :0], ranks[:, None][:, :0])
    return [
        TokenLogprob(token, value, rank, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, value, rank, row_ids, row_values, count in zip(
            token_ids, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), top, strict=True
        )
    ]
