"""What the core and the door need to know of a loaded model: plain data, the same on both sides of the wire."""

from __future__ import annotations

import msgspec


class KVGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers whose keys and values live under one block table.

    ``full`` layers keep every token, ``sliding`` ones only the last ``window``, ``linear`` ones one state a sequence.
    """

    kind: str = "full"  # full | sliding | linear
    window: int = 0  # tokens a sliding layer sees, its own position included
    layers: list[int] = []


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model as requests are checked against it."""

    architecture: str
    vocab_size: int
    max_model_len: int  # tokens of one sequence that the model was made for
    eos_token_ids: list[int]
    bos_token_id: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    num_parameters: int = 0
    embed_size: int = 0  # numbers of a token's embedding; 0: this model takes tokens only
