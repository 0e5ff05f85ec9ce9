"""Text to tokens and back, and chats to text, from the files of a model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from tokenizers import Tokenizer as RustTokenizer

from common_platform.artifact import ModelFolder, open_model_folder
from common_platform.errors import ArtifactFormatError, ArtifactMissing, ArtifactRefused, ArtifactShapeError
from servekit.engine.byte_level import BYTE_OF, TokenBytes
from servekit.engine.chat_template import (
    FILE,
    compiled,
    missing,
    refused,
    special_tokens,
    template_source,
    variables_for,
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NESTED_REPETITION = re.compile(r"\((?:\\.|[^()\\])*?(?:[*+]|\{\d+,\})(?:\\.|[^()\\])*\)(?:[*+]|\{\d+,\})")


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        folder: with ``tokenizer.json``; ``tokenizer_config.json`` and ``chat_template.jinja`` where there are some.

    Raises:
        ArtifactMissing: there is no ``tokenizer.json``.
        ArtifactFormatError: it, or the template, cannot be read.
    """

    def __init__(self, folder: ModelFolder) -> None:
        if not folder.has("tokenizer.json"):
            raise ArtifactMissing("tokenizer.json", "no such file", "a fast tokenizer; save one with transformers")
        data = folder.read_bytes("tokenizer.json")
        try:
            self._tokenizer = RustTokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise ArtifactFormatError("tokenizer.json", str(error), "a file of the tokenizers library") from error
        self._config = folder.read_json("tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
        self._refuse_endless_patterns()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = self._compile(folder)
        self._token_bytes: dict[bool, TokenBytes | None] = {}

    @classmethod
    def from_folder(cls, folder: ModelFolder | str | Path) -> Tokenizer:
        return cls(folder if isinstance(folder, ModelFolder) else open_model_folder(folder, verify=False))

    def _refuse_endless_patterns(self) -> None:
        """A repetition in a repetition may try every way to cut a text up: no tokenizer of ours needs one."""
        tokenizer = self._tokenizer
        for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
            about = b"{}" if part is None else part.__getstate__()
            for pattern in _patterns(json.loads(about)):
                if NESTED_REPETITION.search(pattern):
                    raise ArtifactRefused("tokenizer.json pattern", pattern, "patterns without nested repetitions")

    def check_fits(self, vocab_size: int) -> None:
        """Raise ArtifactShapeError where the tokenizer knows ids that a model of ``vocab_size`` rows does not have."""
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= vocab_size:
            limit = f"ids below the {vocab_size} rows of the model's embeddings"
            raise ArtifactShapeError("tokenizer.json", f"token ids up to {highest}", limit)

    # --- tokens ---

    @cached_property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens by their text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary writes it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; ``add_special_tokens`` adds what the model expects around a prompt."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text; the replacement character where it is a part of one only."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of one token, also where they are not a whole character."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return list(text.encode())
        piece = self._tokenizer.id_to_token(token_id) or ""
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # byte fallback
            return [int(piece[3:5], 16)]
        if all(char in BYTE_OF for char in piece):
            return [BYTE_OF[char] for char in piece]
        return list(text.encode())

    def all_token_bytes(self, *, skip_special_tokens: bool) -> TokenBytes | None:
        """What each token adds to a text; None where that depends on the tokens around it."""
        if skip_special_tokens not in self._token_bytes:
            made = TokenBytes.of(self._tokenizer, skip_special_tokens=skip_special_tokens)
            self._token_bytes[skip_special_tokens] = made
        return self._token_bytes[skip_special_tokens]

    # --- chats ---

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def _compile(self, folder: ModelFolder) -> Template | None:
        source = template_source(folder, self._config)
        if source is None:
            return None
        try:
            return compiled(source)
        except TemplateError as error:
            raise ArtifactFormatError(FILE, str(error), "a Jinja template") from error

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that the model was trained to see for ``messages``.

        Raises:
            RequestError: the model has no template, or its template refuses these messages.
        """
        if self._template is None:
            raise missing()
        shown = variables_for(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            special=special_tokens(self._config),
            variables=variables,
        )
        try:
            return self._template.render(shown)
        except Exception as error:  # a template may raise anything
            raise refused(error) from error


def _patterns(value: Any) -> Iterator[str]:
    """Every regular expression in a part of a tokenizer."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for inner in value.values():
            yield from _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)
