"""``suffix``: what comes between a beginning and an end, by models whose tokenizer has the marks for it.

Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servekit.engine.tokenizer import Tokenizer

PREFIX, SUFFIX = "prefix", "suffix"
FORMS: tuple[tuple[str, ...], ...] = (  # as each family was trained: marks, and the texts that stand between them
    ("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<｜fim▁begin｜>", PREFIX, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>"),  # DeepSeek
    ("[SUFFIX]", SUFFIX, "[PREFIX]", PREFIX),  # Codestral
    ("▁<PRE>", PREFIX, "▁<SUF>", SUFFIX, "▁<MID>"),  # Code Llama
)


@dataclass(frozen=True, slots=True)
class Infill:
    """How a model is asked to fill in: ``parts`` are ids of marks, and names of texts."""

    tokenizer: Tokenizer
    parts: tuple[int | str, ...]

    def prompt(self, prefix: str | Sequence[int], suffix: str) -> list[int]:
        """The token ids that stand before what is to come."""
        begin = self.tokenizer.encode("", add_special_tokens=True)
        texts = {PREFIX: self._ids(prefix), SUFFIX: self._ids(suffix)}
        made = [texts[part] if isinstance(part, str) else [part] for part in self.parts]
        return [*begin, *(token for ids in made for token in ids)]

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)


def infill_of(tokenizer: Tokenizer) -> Infill | None:
    """How the tokenizer's model fills in; None where it has no marks for it."""
    for form in FORMS:
        ids = [part if part in (PREFIX, SUFFIX) else tokenizer.token_id(part) for part in form]
        found = tuple(part for part in ids if part is not None)
        if len(found) == len(form):
            return Infill(tokenizer, found)
    return None
