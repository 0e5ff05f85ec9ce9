"""What is said between a client and the engine's process: typed msgpack, a closed set, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from servekit.core.facts import ModelFacts
from servekit.core.request import Update
from servekit.core.stats import SchedulerStats
from servekit.engine.config import EngineConfig
from servekit.engine.validate import EngineRequest


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message: load this."""

    config: EngineConfig


class Add(msgspec.Struct, tag=True, frozen=True):
    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    sequence_ids: list[str]


class Ask(msgspec.Struct, tag=True, frozen=True):
    """A question that is answered by ``Answer`` with the same number."""

    number: int
    what: str  # stats | reset_prefix_cache | sleep | wake_up
    level: int = 0  # of sleep


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End after the step under way."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded and proven."""

    facts: ModelFacts
    num_blocks: int
    block_size: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine could not start; ``error`` is ``PlatformError.to_dict()``."""

    error: dict[str, Any]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that only the scheduler could judge."""

    request_id: str
    error: dict[str, Any]


class News(msgspec.Struct, tag=True, frozen=True):
    updates: list[Update]


class Answer(msgspec.Struct, tag=True, frozen=True):
    number: int
    stats: SchedulerStats | None = None
    done: bool = True
    error: dict[str, Any] | None = None  # ``PlatformError.to_dict()``


ToEngine = Start | Add | Abort | Ask | Stop
FromEngine = Ready | Failed | Refused | News | Answer

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
