"""Every number that comes from outside has a limit; each limit has a default and a flag."""

from __future__ import annotations

from dataclasses import dataclass, fields

from common_platform.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The flag of a field is its name with dashes: ``max_body_bytes`` is ``--max-body-bytes``."""

    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 16384
    max_json_depth: int = 64
    max_json_nodes: int = 1_000_000
    body_timeout_s: float = 30.0
    max_streams: int = 512  # streaming answers open at once
    max_queue: int = 1024  # requests that wait for a slot
    max_prompts: int = 256  # of one request
    max_seqs_per_request: int = 256  # prompts x n
    max_tokens_per_request: int = 0  # n x max_tokens; 0: 4 x the model's length
    max_messages: int = 2048
    max_parts: int = 256  # of one message
    max_tools: int = 128
    max_request_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < (0 if field.name in ("max_tokens_per_request", "max_queue") else 1):
                raise ConfigError(field.name, getattr(self, field.name), "1 or more", flag=flag_of(field.name))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
