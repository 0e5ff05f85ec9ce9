"""What is asked: prompts of random words or of a file, and how long each answer is to be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError

if TYPE_CHECKING:  # every command of servekit reads this file, to know its flags
    from servekit.engine.tokenizer import Tokenizer

DATASETS = ("random", "sharegpt", "custom")
WORDS = (
    "the of and to in is was for on that with as it be are this from at which or by not have an they one all were we "
    "when there can more if no out so up about into them then some could time other than been its who now people may"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How many prompts, and of what kind.

    Lengths of random ones are drawn evenly from ``len * (1 - range_ratio)`` to ``len * (1 + range_ratio)`` tokens.
    """

    dataset_name: str = "random"
    dataset_path: Path | None = None
    num_prompts: int = 1000
    input_len: int = 1024  # tokens
    output_len: int | None = None  # tokens; None: 128, or what a file says
    range_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise ConfigError("dataset_name", self.dataset_name, f"one of {', '.join(DATASETS)}", flag="--dataset-name")
        if self.dataset_name != "random" and self.dataset_path is None:
            limit = f"a file, which {self.dataset_name} is read from"
            raise ConfigError("dataset_path", "none", limit, flag="--dataset-path")
        for name in ("num_prompts", "input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "1 or more", flag="--" + name.replace("_", "-"))
        if not 0 <= self.range_ratio < 1:
            raise ConfigError("range_ratio", self.range_ratio, "[0, 1)", flag="--random-range-ratio")


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt; ``messages`` where a file has a chat."""

    prompt: str
    output_len: int
    messages: list[dict[str, Any]] | None = None


def asks_of(workload: Workload, tokenizer: Tokenizer | None) -> list[Ask]:
    """All prompts, the same for the same seed; a file with too few begins again.

    Args:
        tokenizer: cuts random prompts to their length; without one a word stands for a token.

    Raises:
        ConfigError: the file cannot be read, or holds nothing to ask.
    """
    chance = random.Random(workload.seed)
    if workload.dataset_name == "random":
        return [_random(workload, tokenizer, chance) for _ in range(workload.num_prompts)]
    found = list(_read(workload))
    if not found:
        limit = "lines with prompt or messages, or conversations as ShareGPT has them"
        raise ConfigError("dataset_path", str(workload.dataset_path), limit, flag="--dataset-path")
    chance.shuffle(found)
    return [found[i % len(found)] for i in range(workload.num_prompts)]


def _random(workload: Workload, tokenizer: Tokenizer | None, chance: random.Random) -> Ask:
    num_input = _drawn(workload.input_len, workload.range_ratio, chance)
    text = " ".join(chance.choices(WORDS.split(), k=num_input))
    if tokenizer is not None:
        text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:num_input])
    return Ask(text, _drawn(workload.output_len or 128, workload.range_ratio, chance))


def _drawn(length: int, ratio: float, chance: random.Random) -> int:
    return max(1, chance.randint(int(length * (1 - ratio)), int(length * (1 + ratio))))


def _read(workload: Workload) -> Iterator[Ask]:
    """JSON (a list) or JSON Lines."""
    path = workload.dataset_path or Path()
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except (OSError, ValueError) as error:
        raise ConfigError(
            "dataset_path", str(path), f"a JSON or JSON Lines file: {error}", flag="--dataset-path"
        ) from error
    for row in rows:
        ask = _ask(row, workload) if isinstance(row, dict) else None
        if ask is not None:
            yield ask


def _ask(row: dict[str, Any], workload: Workload) -> Ask | None:
    length = workload.output_len or row.get("output_tokens") or row.get("max_tokens") or 128
    if isinstance(row.get("messages"), list):
        last = row["messages"][-1].get("content") if row["messages"] else None
        return Ask(str(last or ""), int(length), row["messages"])
    if isinstance(row.get("prompt"), str):
        return Ask(row["prompt"], int(length))
    turns = row.get("conversations") or row.get("conversation")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("value"):
        answer = turns[1].get("value", "") if len(turns) > 1 else ""
        length = workload.output_len or max(1, len(str(answer).split()) * 4 // 3) if answer else length
        return Ask(str(turns[0]["value"]), int(length))
    return None
