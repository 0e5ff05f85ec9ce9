"""Direct preference optimization: which of two answers is better, without a reward model. Rafailov et al. 2023."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import Dataset

from common_platform.errors import ConfigError
from trainkit.lm.data import IGNORED, Example, collate_packed, encode_chat
from trainkit.lm.lora import has_adapter, without_adapter
from trainkit.lm.loss import chunked_logprobs
from trainkit.lm.module import CausalLM
from trainkit.lm.tokenizer import load_tokenizer

Message = dict[str, str]
NO_LIMIT = 1 << 62  # tokens


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation and two ways to go on.

    Args:
        prompt: messages of ``{"role", "content"}``, the last one the user's.
        chosen, rejected: what the assistant should and should not say.
    """

    prompt: Sequence[Message]
    chosen: str
    rejected: str


Pair = dict[str, Any]  # "chosen", "rejected": Example; "reference": two floats once they are known


class PreferenceDataset(Dataset[Pair]):
    """Preferences through a model's own template.

    Args:
        preferences: the pairs.
        tokenizer: a tokenizer of transformers, or a folder with one.
        max_length: tokens; a pair of which one answer has no token within it is left out.

    Raises:
        ConfigError: no pair is left, or the two answers of one are the same.
    """

    def __init__(self, preferences: Sequence[Preference], tokenizer: Any, max_length: int = 1024) -> None:
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        pairs = [self._encode(number, one, max_length) for number, one in enumerate(preferences)]
        self._pairs = [pair for pair in pairs if all(_is_learnt(pair[name]) for name in ("chosen", "rejected"))]
        self.num_dropped = len(pairs) - len(self._pairs)
        if not self._pairs:
            raise ConfigError("preferences", f"{len(pairs)} pairs", f"one whose answers begin in {max_length} tokens")

    def _encode(self, number: int, one: Preference, max_length: int) -> Pair:
        if one.chosen == one.rejected:
            raise ConfigError(f"preferences[{number}]", "two equal answers", "a chosen one and another one")
        return {
            name: _last_answer(one.prompt, answer, self.tokenizer, max_length)
            for name, answer in (("chosen", one.chosen), ("rejected", one.rejected))
        }

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[index]

    def collate(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """One packed row: all chosen answers, then all rejected ones, each behind its own copy of the prompt.

        Returns:
            What ``collate_packed`` returns, and ``reference`` ``[2, pairs]`` float32 after ``add_reference``.
        """
        documents = [pair[name] for name in ("chosen", "rejected") for pair in pairs]
        batch = collate_packed([documents])
        if all("reference" in pair for pair in pairs):
            batch["reference"] = torch.tensor([pair["reference"] for pair in pairs]).T.contiguous()
        return batch

    def add_reference(self, module: CausalLM, *, batch_size: int = 4) -> None:
        """Compute what ``module``'s model, as it is now, thinks of all answers, so that no copy of it must be kept."""
        was_training = module.training
        module.eval()
        with torch.no_grad():
            for start in range(0, len(self), batch_size):
                pairs = self._pairs[start : start + batch_size]
                batch = {name: part.to(module.device) for name, part in self.collate(pairs).items()}
                chosen, rejected = answer_logprobs(module, batch).tolist()
                for pair, *values in zip(pairs, chosen, rejected, strict=True):
                    pair["reference"] = values
        module.train(was_training)


def _last_answer(prompt: Sequence[Message], answer: str, tokenizer: Any, max_length: int) -> Example:
    """The whole conversation, of which only the last answer is learnt."""
    chat = [*prompt, {"role": "assistant", "content": answer}]
    whole = encode_chat(chat, tokenizer, NO_LIMIT)
    labels = whole["labels"]
    start = len(labels)
    while start and labels[start - 1] != IGNORED:  # earlier answers end with a question behind them
        start -= 1
    labels = [IGNORED] * start + labels[start:]
    return {"input_ids": whole["input_ids"][:max_length], "labels": labels[:max_length]}


def _is_learnt(example: Example) -> bool:
    return any(label != IGNORED for label in example["labels"])


def answer_logprobs(module: CausalLM, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probability of each answer, summed over its tokens: ``[2, pairs]`` float32, chosen and rejected."""
    hidden, targets = module.learnt_states(batch)
    logprobs = chunked_logprobs(hidden, targets, module.head, chunk=module.hparams["loss_chunk"])
    lengths = batch["lengths"].to(targets.device)
    number = torch.repeat_interleave(torch.arange(len(lengths), device=targets.device), lengths)
    learnt = batch["labels"][0, 1:] != IGNORED
    sums = logprobs.new_zeros(len(lengths)).index_add(0, number[1:][learnt], logprobs)
    return sums.view(2, -1)


def dpo_loss(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Equation 7 of Rafailov et al. 2023, for each pair.

    Args:
        policy, reference: ``[2, pairs]``, log-probabilities of the chosen and the rejected answer.
        beta: how dear it is to leave the reference.
        label_smoothing: the share of preferences that are the wrong way round (Mitchell 2023, conservative DPO).

    Returns:
        The losses ``[pairs]``, and the rewards ``[2, pairs]`` without a gradient: ``beta * (policy - reference)``.
    """
    rewards = beta * (policy - reference)
    margin = rewards[0] - rewards[1]
    losses = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return losses, rewards.detach()


class DPO(CausalLM):
    """Trains a model on batches of ``PreferenceDataset``.

    The reference is the model as it was: what ``PreferenceDataset.add_reference`` wrote down; else the model with its
    adapter switched off; else a frozen copy of it, made here.

    Args:
        model, settings: as ``CausalLM``'s.
        beta: how dear it is to leave the reference, 0.01 to 0.5 in practice.
        label_smoothing: the share of preferences that are the wrong way round, in [0, 0.5).
        copies_reference: False: every batch has its reference, so that no copy is needed.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        copies_reference: bool = True,
        lr: float = 1e-6,
        **settings: Any,
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ConfigError("beta", beta, "a number above 0")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError("label_smoothing", label_smoothing, "in [0, 0.5)")
        super().__init__(model, lr=lr, **settings)
        self.hparams.update(beta=beta, label_smoothing=label_smoothing)
        self._reference: list[CausalLM] = []  # in a list: no part of this module, its checkpoints and its device moves
        if copies_reference and not has_adapter(self.model):
            frozen = copy.deepcopy(self.model)
            self._reference = [CausalLM(frozen, loss_chunk=self.hparams["loss_chunk"]).freeze()]

    def reference_logprobs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``[2, pairs]``, without a gradient.

        Raises:
            ConfigError: there is no reference.
        """
        if "reference" in batch:
            return batch["reference"]
        with torch.no_grad():
            if has_adapter(self.model):
                was_training = self.model.training
                self.model.eval()
                try:
                    with without_adapter(self.model):
                        return answer_logprobs(self, batch)
                finally:
                    self.model.train(was_training)
            if not self._reference:
                raise ConfigError("reference", None, "PreferenceDataset.add_reference, or copies_reference=True")
            return answer_logprobs(self._reference[0].to(self.device), batch)

    def preference_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Losses ``[pairs]`` and rewards ``[2, pairs]``; see ``dpo_loss``."""
        settings = self.hparams
        reference = self.reference_logprobs(batch)
        return dpo_loss(
            answer_logprobs(self, batch), reference, beta=settings["beta"], label_smoothing=settings["label_smoothing"]
        )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        losses, rewards = self.preference_loss(batch)
        self._log_preferences("train", losses, rewards)
        return {"loss": losses.mean(), "weight": len(losses)}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._log_preferences("val", *self.preference_loss(batch))

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._log_preferences("test", *self.preference_loss(batch))

    def _log_preferences(self, stage: str, losses: Tensor, rewards: Tensor) -> None:
        margin = rewards[0] - rewards[1]
        found = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
        for name, value in found.items():
            self.log(f"{stage}_{name}", value.mean(), prog_bar=name != "margin", weight=len(losses))
