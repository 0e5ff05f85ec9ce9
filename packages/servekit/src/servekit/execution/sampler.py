"""From logits to tokens, for a whole batch at once.

The order, which vLLM's users know: masks (allowed tokens, bad words, min_tokens, grammar), logit_bias, penalties,
temperature, min-p, top-k, top-p, typical. Logprobs are of the model's own distribution, before any of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common_platform.errors import PlatformError
from servekit.core.plan import TokenLogprob
from servekit.execution import sampling_ops as ops
from servekit.execution.logits_processors import Factory, make_processors
from servekit.execution.logprobs import token_logprobs
from servekit.execution.penalties import PenaltyTable
from servekit.execution.sampler_row import Grammar, SamplerRow, add_masks
from servekit.execution.token_masks import Words, every_token
from servekit.kernels.argmax import argmax_for
from servekit.kernels.paged_attention.metadata import to_device
from servekit.layers.kernels import LogitKernels, Sample
from servekit.sampling.parameters import SamplingParams

NO_TOKEN = -1
REFERENCE = LogitKernels()


@dataclass(slots=True)
class SampleOutput:
    """``token_ids`` in the order of the slots asked for, ``NO_TOKEN`` for those in ``errors``."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def chosen(highest: Tensor | NDArray[np.float32], ids: Tensor | NDArray[np.int64]) -> SampleOutput | None:
    """The most likely tokens; None where a row's highest logit is not finite, and what is wrong is to be found out."""
    return SampleOutput(ids.tolist()) if math.isfinite(float(highest.sum())) else None


class Sampler:
    """Parameters of all slots in arrays that are updated in place; one row a request.

    Args:
        kernel: ``servekit.kernels.sample`` of the device; None draws by torch's operations, with other random numbers.
        processors: logits processors of every request, beside those that it names.
        edit: ``servekit.kernels.logits`` of the device.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device | str = "cpu",
        kernel: Sample | None = None,
        processors: Sequence[Factory] = (),
        edit: LogitKernels = REFERENCE,
    ) -> None:
        self._kernel = kernel
        self._edit_kernels = edit
        self._processors = processors
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._argmax = argmax_for(self.device)
        self._rows: dict[int, SamplerRow] = {}
        self._special: set[int] = set()  # slots that want more than their most likely token
        self._looked_at: set[int] = set()  # slots that are not always drawn by the device alone
        self._adjusted: set[int] = set()  # slots with penalties or biases
        self._grammars: set[int] = set()
        self._penalties = PenaltyTable(vocab_size, self.device)
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
        self._seeds = np.zeros(max_num_seqs, np.uint64)

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
        self._seeds[slot] = ops.seed_of(params.seed)
        self._top_k[slot] = params.top_k if params.top_k > 0 else self.vocab_size
        row = SamplerRow(
            params,
            prompt_ids,
            list(output_ids),
            [*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)],
            grammar,
            make_processors(params, self._processors),
        )
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            row.penalties = self._penalties.add(prompt_ids, row.output_ids)
        add_masks(row, self.vocab_size)
        if grammar is not None and not grammar.accept(row.output_ids):
            row.failure = "the grammar does not allow what was generated before"
        self._rows[slot] = row
        if row.is_special:
            self._special.add(slot)
        if row.is_looked_at:
            self._looked_at.add(slot)
        if row.is_adjusted:
            self._adjusted.add(slot)
        if grammar is not None:
            self._grammars.add(slot)

    def remove_row(self, slot: int) -> None:
        row = self._rows.pop(slot)
        if row.penalties is not None:
            self._penalties.remove(row.penalties)
        for slots in (self._special, self._looked_at, self._adjusted, self._grammars):
            slots.discard(slot)

    @property
    def has_grammars(self) -> bool:
        return bool(self._grammars)

    def forced(self, slot: int) -> list[int]:
        """The tokens that the grammar of ``slot`` leaves no choice about; empty without one."""
        grammar = self._rows[slot].grammar
        return grammar.forced() if grammar else []

    def is_plain(self, slots: Sequence[int]) -> bool:
        """Whether the device can draw for all ``slots`` alone: the host need not know what came before."""
        if self._kernel is None:
            return False
        rows = [self._rows[slot] for slot in slots if slot in self._looked_at]
        return not any(row.is_edited or row.params.logprobs is not None or row.params.typical_p < 1 for row in rows)

    def draw_unseen(self, logits: Tensor, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A token for each of some plain slots, which the host need not know; ``[len(slots)]``, and the highest logits.

        A row whose highest logit is not finite has no token. ``logits`` may be changed.
        """
        rows, penalised = [self._rows[slot] for slot in slots], None
        if not self._adjusted.isdisjoint(slots):
            self._add_biases(logits, rows)
            penalised = self._penalise(logits, slots, rows)
        tokens, highest = self._by_kernel(logits, np.asarray(slots), rows)
        if penalised is not None:
            self._penalties.count(penalised[1], tokens[penalised[0]])
        for row in rows:
            row.output_ids.append(NO_TOKEN)  # only their number matters to plain rows
        return tokens, highest

    def warm_up(self) -> None:
        """Call each of the device's kernels once, for a row that wants all of them."""
        if self._kernel is None:
            return
        logits, first = torch.zeros((1, self.vocab_size), device=self.device), self._on_device([0])
        place = self._penalties.add([], [])
        ones, seeds = torch.ones(1, device=self.device), first
        counts, in_prompt = self._penalties.counts, self._penalties.in_prompt
        self._edit_kernels.penalise(logits, first, self._on_device([place]), counts, in_prompt, ones, ones, ones)
        self._edit_kernels.mask(logits, first, to_device(every_token(self.vocab_size)[None], self.device))
        self._edit_kernels.add_bias(logits, first, first, ones)
        self._kernel(logits, ones, first.to(torch.int32) + 1, ones, ones, seeds)
        self._penalties.remove(place)

    def _by_kernel(self, logits: Tensor, slots: np.ndarray, rows: Sequence[SamplerRow]) -> tuple[Tensor, Tensor]:
        """The tokens and the highest logits; what the kernel does not know is applied to the rows that ask for it."""
        if self._kernel is None:
            raise RuntimeError("there is no sampling kernel on this device")
        floats = np.stack([self._columns[name][slots] for name in ("temperature", "top_p", "min_p")])
        top_k = np.minimum(self._top_k[slots], self.vocab_size)
        typical = np.flatnonzero((self._columns["typical_p"][slots] < 1) & (floats[0] > 0))
        if len(typical):
            at = to_device(typical, self.device)
            logits = logits.index_copy(0, at, self._limited(logits[at], slots[typical]))
            floats[:, typical] = [[1.0], [1.0], [0.0]]
            top_k[typical] = self.vocab_size
        seeds = ops.counter_seeds(self._seeds[slots], _lengths(rows))
        temperature, top_p, min_p = to_device(floats, self.device)
        whole = to_device(np.stack([seeds.view(np.int64), top_k]), self.device)
        return self._kernel(logits, temperature, whole[1].to(torch.int32), top_p, min_p, whole[0].contiguous())

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes its most likely token, and wants to know nothing else."""
        return not self._special

    def sample(self, logits: Tensor, slots: Sequence[int]) -> SampleOutput:
        """One token for each slot.

        Args:
            logits: ``[len(slots), vocab]`` float32, as the model made them; not changed.
        """
        if self.is_greedy and (output := chosen(*self._argmax(logits))):
            return output
        return self._sample(logits, slots)

    def _sample(self, logits: Tensor, slots: Sequence[int]) -> SampleOutput:
        rows = [self._rows[slot] for slot in slots]
        errors: dict[int, str] = {}
        edited = self._edited(logits, slots, rows, errors)
        drawn, highest = self._drawn(edited, np.asarray(slots), rows)
        tokens = drawn.tolist()
        self._find_broken(logits, highest, tokens, slots, errors)
        output = SampleOutput(tokens, errors=errors)
        self._accept(output, slots, rows)
        output.logprobs = self._logprobs(logits, output, slots, rows)
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
        """With what the rows' masks, biases, processors and penalties make of them; one that fails gets an error."""
        if not any(row.is_edited or row.params.logit_bias or row.is_penalised for row in rows):
            return logits
        logits = logits.clone()
        self._mask(logits, slots, rows, errors)
        self._add_biases(logits, rows)
        self._process(logits, slots, rows, errors)
        self._penalise(logits, slots, rows)
        return logits

    def _mask(self, logits: Tensor, slots: Sequence[int], rows: list[SamplerRow], errors: dict[int, str]) -> None:
        masks: dict[int, Words] = {}
        for i, row in enumerate(rows):
            if row.failure:
                errors[slots[i]] = row.failure
            elif row.is_masked:
                try:
                    masks[i] = row.next_mask(self.vocab_size)
                except Exception as error:  # noqa: BLE001 - one request's own grammar: it alone ends
                    errors[slots[i]] = _told(error, "grammar")
        if masks:
            bits = to_device(np.stack(list(masks.values())), self.device)
            self._edit_kernels.mask(logits, self._on_device(list(masks)), bits)

    def _add_biases(self, logits: Tensor, rows: list[SamplerRow]) -> None:
        given = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
        if given:
            at = np.repeat([i for i, _ in given], [len(bias) for _, bias in given])
            tokens = [token for _, bias in given for token in bias]
            values = np.asarray([value for _, bias in given for value in bias.values()], np.float32)
            biases = to_device(values, self.device)
            self._edit_kernels.add_bias(logits, self._on_device(at), self._on_device(tokens), biases)

    def _process(self, logits: Tensor, slots: Sequence[int], rows: list[SamplerRow], errors: dict[int, str]) -> None:
        for i, row in enumerate(rows):
            if not row.processors or slots[i] in errors:
                continue
            try:
                for processor in row.processors:
                    logits[i] = processor(row.prompt_ids, row.output_ids, logits[i])
            except Exception as error:  # noqa: BLE001 - one request's own processors: it alone ends
                errors[slots[i]] = _told(error, "logits")

    def _penalise(self, logits: Tensor, slots: Sequence[int], rows: list[SamplerRow]) -> tuple[Tensor, Tensor] | None:
        """Where the rows with penalties are among ``logits``, and in the table; None where there are none."""
        found = {i: row.penalties for i, row in enumerate(rows) if row.penalties is not None}
        if not found:
            return None
        at, places = self._on_device(list(found)), self._on_device(list(found.values()))
        columns = [self._columns[f"{kind}_penalty"] for kind in ("presence", "frequency", "repetition")]
        given = to_device(np.stack(columns)[:, [slots[i] for i in found]], self.device)
        self._edit_kernels.penalise(
            logits, at, places, self._penalties.counts, self._penalties.in_prompt, given[0], given[1], given[2]
        )
        return at, places

    def _on_device(self, numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return to_device(np.asarray(numbers, np.int64), self.device)

    def _column(self, name: str, slots: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(self._columns[name][slots])[:, None].to(self.device)

    def _drawn(self, logits: Tensor, slots: np.ndarray, rows: list[SamplerRow]) -> tuple[Tensor, Tensor]:
        """Greedy rows keep their most likely token, the others draw; and the highest logits."""
        if self._kernel is not None:
            return self._by_kernel(logits, slots, rows)
        highest, greedy = self._argmax(logits)
        drawing = np.flatnonzero(self._columns["temperature"][slots] > 0)
        if not len(drawing):
            return greedy, highest
        at = self._on_device(drawing)
        limited = self._limited(logits if len(drawing) == len(slots) else logits[at], slots[drawing])
        uniforms = ops.uniforms(self._seeds[slots[drawing]], _lengths([rows[i] for i in drawing]))
        drawn = ops.draw(limited, to_device(uniforms, self.device))
        return greedy.index_copy(0, at, drawn), highest

    def _limited(self, logits: Tensor, slots: np.ndarray) -> Tensor:
        """Of rows that draw: with temperature, and without the tokens that their limits leave out."""
        logits = logits / self._column("temperature", slots)
        if (self._columns["min_p"][slots] > 0).any():
            logits = ops.keep_min_p(logits, self._column("min_p", slots))
        top_k, top_p = self._top_k[slots], self._columns["top_p"][slots]
        if (top_k < self.vocab_size).any() or (top_p < 1).any():
            logits = ops.keep_top(logits, torch.from_numpy(top_k).to(self.device), self._column("top_p", slots))
        if (self._columns["typical_p"][slots] < 1).any():
            logits = ops.keep_typical(logits, self._column("typical_p", slots))
        return logits

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
        counted = [
            (row.penalties, row.output_ids[-1])
            for row, slot in zip(rows, slots, strict=True)
            if row.penalties is not None and slot not in output.errors
        ]
        if counted:
            self._penalties.count(*(self._on_device(part) for part in zip(*counted, strict=True)))

    def _logprobs(
        self, raw: Tensor, output: SampleOutput, slots: Sequence[int], rows: list[SamplerRow]
    ) -> dict[int, TokenLogprob]:
        wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None and slots[i] not in output.errors]
        if not wanted:
            return {}
        counts = [rows[i].params.logprobs or 0 for i in wanted]
        entries = token_logprobs(raw[wanted], [output.token_ids[i] for i in wanted], counts)
        return {slots[i]: entry for i, entry in zip(wanted, entries, strict=True)}


def _lengths(rows: Sequence[SamplerRow]) -> NDArray[np.int64]:
    """How many tokens each has said."""
    return np.fromiter((len(row.output_ids) for row in rows), np.int64, len(rows))


def _told(error: Exception, place: str) -> str:
    """Our own sentence; of a plugin's error only its kind, for the text may hold what is not the caller's."""
    return error.message if isinstance(error, PlatformError) else f"{type(error).__name__} in this request's {place}"
