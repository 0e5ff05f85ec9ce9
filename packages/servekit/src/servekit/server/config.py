"""Where to listen, for whom, and how to end."""

from __future__ import annotations

import ipaddress
import math

import msgspec

from common_platform.errors import ConfigError
from servekit.server.embedding_model import POOLING
from servekit.server.limits import ServerLimits


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the server that is not about the engine.

    Raises:
        ConfigError: a value is out of range, or the settings together would leave the server open to a network.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ("model",)  # the first is the one in answers
    allow_insecure_bind: bool = False
    ignore_unknown_fields: bool = False
    allow_request_priority: bool = False
    shutdown_timeout_s: float = 30.0
    tool_call_parser: str = "auto"  # auto | none | a name of parsers/registry.py
    reasoning_parser: str = "auto"
    allow_request_chat_template: bool = False
    pooling: str = "auto"  # auto | none | last | mean: how /v1/embeddings makes a vector of a prompt
    limits: ServerLimits = ServerLimits()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", self.port, "0..65535", flag="--port")
        if not (math.isfinite(self.shutdown_timeout_s) and self.shutdown_timeout_s >= 0):
            raise ConfigError("shutdown_timeout_s", self.shutdown_timeout_s, "0 or more", flag="--shutdown-timeout-s")
        if self.pooling not in POOLING:
            raise ConfigError("pooling", self.pooling, f"one of {POOLING}", flag="--pooling")
        for name in self.served_model_names:
            if not name or len(name) > 256 or not name.isprintable():
                raise ConfigError("served_model_name", name, "1..256 characters", flag="--served-model-name")
        if not self.served_model_names:
            raise ConfigError("served_model_name", "none", "at least one", flag="--served-model-name")
        for key in self.api_keys:
            _check_key(key)
        if not (self.api_keys or self.allow_insecure_bind or is_loopback(self.host)):
            raise ConfigError(
                "host",
                self.host,
                "a loopback address where no --api-key or --api-key-file is given",
                flag="--host, --api-key-file or --insecure-no-auth (--allow-insecure-bind)",
                code="insecure_bind",
            )


def _check_key(key: str) -> None:
    """The key itself never stands in the error."""
    if not (8 <= len(key) <= 512 and key.isascii() and key.isprintable()) or " " in key:
        limit = "8..512 printable ASCII characters without spaces"
        raise ConfigError("api_key", f"{len(key)} characters", limit, flag="--api-key-file", code="invalid_api_key")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
