"""Chats as training examples: tokens, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common_platform.errors import ConfigError
from trainkit.lm.tokenizer import load_tokenizer

IGNORED = -100  # a label that is not learnt
Chat = Sequence[dict[str, str]]
Example = dict[str, list[int]]


class ChatDataset(Dataset[Example]):
    """Chats through a model's own template; only what the assistant says is learnt.

    Args:
        chats: lists of ``{"role", "content"}``.
        tokenizer: a tokenizer of transformers, or a folder with one.
        max_length: tokens; a longer chat loses its end, and is left out where no answer would remain.

    Raises:
        ConfigError: no chat is left, or the template cannot be rendered turn by turn.
    """

    def __init__(self, chats: Sequence[Chat], tokenizer: Any, max_length: int = 1024) -> None:
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        if max_length < 2:
            raise ConfigError("max_length", max_length, "2 or more tokens")
        encoded = [encode_chat(chat, self.tokenizer, max_length) for chat in chats]
        self._examples = [e for e in encoded if any(label != IGNORED for label in e["labels"])]
        self.num_dropped = len(encoded) - len(self._examples)
        if not self._examples:
            raise ConfigError("chats", f"{len(encoded)} chats", f"at least one with an answer in {max_length} tokens")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch padded on the right: ``input_ids``, ``attention_mask``, ``labels``, each ``[batch, longest]``."""
        return pad(examples, self.tokenizer.pad_token_id or 0)


def encode_chat(chat: Chat, tokenizer: Any, max_length: int) -> Example:
    """One chat as ``input_ids`` and ``labels``; everything that an assistant did not say is ``IGNORED``.

    An answer is what a turn adds to the rendering of the turns before it, with the opening of the answer; nothing is
    searched for in the text.
    """
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for index, message in enumerate(chat):
        opened = (
            tokenizer.apply_chat_template(list(chat[:index]), tokenize=False, add_generation_prompt=True)
            if index
            else ""
        )
        after = tokenizer.apply_chat_template(list(chat[: index + 1]), tokenize=False)
        if not after.startswith(before):
            raise ConfigError("chat_template", "a turn changes the ones before it", "a template that only adds turns")
        learnt = message["role"] == "assistant" and index > 0
        if learnt and after.startswith(opened) and opened.startswith(before):
            _extend(ids, labels, tokenizer, opened[len(before) :], False)
            _extend(ids, labels, tokenizer, after[len(opened) :], True)
        else:
            _extend(ids, labels, tokenizer, after[len(before) :], learnt)
        before = after
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _extend(ids: list[int], labels: list[int], tokenizer: Any, text: str, learnt: bool) -> None:
    new = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    ids += new
    labels += new if learnt else [IGNORED] * len(new)


def pad(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded tensors of ``examples``."""
    longest = max(len(example["input_ids"]) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)
    labels = torch.full((len(examples), longest), IGNORED)
    attention_mask = torch.zeros((len(examples), longest), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Put examples together so that each group has at most ``max_length`` tokens, with few groups.

    First-fit decreasing: the longest first, each into the first group with room. The result is always the same.

    Raises:
        ConfigError: an example alone is longer.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i))
    groups: list[list[int]] = []
    room: list[int] = []
    for index in order:
        length = len(examples[index]["input_ids"])
        if length > max_length:
            raise ConfigError("max_length", max_length, f"{length} or more, the length of example {index}")
        place = next((g for g, left in enumerate(room) if left >= length), None)
        if place is None:
            groups.append([])
            room.append(max_length)
            place = len(groups) - 1
        groups[place].append(index)
        room[place] -= length
    return [[examples[i] for i in group] for group in groups]


def collate_packed(groups: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """One row of all documents of all groups, without a pad token between them.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` ``[1, tokens]`` int64, positions from 0 in each document, and
        ``lengths`` ``[documents]`` int64. The first label of a document is ``IGNORED``: nothing before it is its own.
    """
    documents = [example for group in groups for example in group]
    lengths = [len(example["input_ids"]) for example in documents]
    input_ids = [token for example in documents for token in example["input_ids"]]
    labels = [label for example in documents for label in [IGNORED, *example["labels"][1:]]]
    return {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "lengths": torch.tensor(lengths),
    }


class PackedDataset(Dataset[list[Example]]):
    """A ``ChatDataset`` whose items are groups of chats, packed once.

    Args:
        dataset: the chats.
        max_length: tokens of a row.
    """

    def __init__(self, dataset: ChatDataset, max_length: int) -> None:
        self._groups = pack([dataset[i] for i in range(len(dataset))], max_length)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> list[Example]:
        return self._groups[index]

    def collate(self, groups: Sequence[list[Example]]) -> dict[str, Tensor]:
        """A batch of ``CausalLM``; see ``collate_packed``."""
        return collate_packed(groups)
