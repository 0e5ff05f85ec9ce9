"""How drafts for speculative decoding are made. Without torch: whoever only hands settings on does not load it."""

from __future__ import annotations

import msgspec

from common_platform.errors import ConfigError

METHODS = ("ngram", "draft_model")


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How drafts are made; the names are vLLM's."""

    method: str = ""  # ngram | draft_model; unset: draft_model where a model is named
    model: str | None = None  # the draft model's folder; its vocabulary is the target's
    num_speculative_tokens: int = 4  # drafts of a row in one step
    prompt_lookup_max: int = 4  # ngram: longest run of tokens that is looked up
    prompt_lookup_min: int = 2  # ngram: shortest

    def __post_init__(self) -> None:
        if self.method not in ("", *METHODS):
            raise ConfigError("speculative_config.method", self.method, f"one of {METHODS}")
        if (self.method == "draft_model") > (self.model is not None):
            raise ConfigError("speculative_config.model", None, "a model folder for method draft_model")
        if self.method == "ngram" and self.model is not None:
            raise ConfigError("speculative_config.model", self.model, "none for method ngram")
        if not 1 <= self.num_speculative_tokens <= 32:
            name = "speculative_config.num_speculative_tokens"
            raise ConfigError(name, self.num_speculative_tokens, "1..32", flag="--num-speculative-tokens")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= 32:
            name, limit = "speculative_config.prompt_lookup_min", f"1..prompt_lookup_max={self.prompt_lookup_max}"
            raise ConfigError(name, self.prompt_lookup_min, limit)

    @classmethod
    def parse(cls, text: str) -> SpeculativeConfig:
        """Read JSON.

        Raises:
            ConfigError: it is no object of these fields.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.ValidationError as error:
            raise error.__cause__ if isinstance(error.__cause__, ConfigError) else _not_json(text, error) from None
        except msgspec.DecodeError as error:
            raise _not_json(text, error) from None


def _not_json(text: str, error: Exception) -> ConfigError:
    return ConfigError(
        "speculative_config", text, f"a JSON object of its fields ({error})", flag="--speculative-config"
    )
