"""Where to listen, for whom, and how to end."""

from __future__ import annotations

import ipaddress
import math
from pathlib import Path

import msgspec

from common_platform.errors import ConfigError
from servekit.engine.supervisor import RestartPolicy
from servekit.multimodal.limits import MediaLimits, check_dir, check_domain
from servekit.server.budgets import Budget
from servekit.server.embedding_model import POOLING
from servekit.server.keys import check_key, read_keys
from servekit.server.limits import ServerLimits, flag_of


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the server that is not about the engine.

    Raises:
        ConfigError: a value is out of range, or the settings together would leave the server open to a network.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None  # with more keys; read again at SIGHUP
    admin_port: int | None = None  # of the listener for management; 0: any free one; None: there is none
    admin_host: str = "127.0.0.1"
    admin_keys: tuple[str, ...] = ()
    public_page: bool = False  # the page at / needs no key, though what it asks for does
    allowed_origins: tuple[str, ...] = ()  # of pages that may call the server
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None  # callers must then show a certificate of these
    budget: Budget = Budget()
    max_engine_restarts: int = 3  # within ten minutes; then the server ends
    served_model_names: tuple[str, ...] = ("model",)  # the first is the one in answers
    allow_insecure_bind: bool = False
    ignore_unknown_fields: bool = False
    allow_request_priority: bool = False
    enable_prompt_embeds: bool = False  # in completions
    shutdown_timeout_s: float = 30.0
    tool_call_parser: str = "auto"  # auto | none | a name of parsers/registry.py
    reasoning_parser: str = "auto"
    allow_request_chat_template: bool = False
    chat_template: str | None = None  # a file with another than the model's own
    allowed_media_domains: tuple[str, ...] = ()  # whose pictures may be named by URL
    allowed_media_dirs: tuple[str, ...] = ()  # whose pictures may be named as file: URLs
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
        for key in (*self.api_keys, *self.admin_keys):
            check_key(key)
        if self.api_key_file is not None:
            read_keys(self.api_key_file)  # a file that cannot be used is known before a model is loaded
        for domain in self.allowed_media_domains:
            check_domain(domain)
        for folder in self.allowed_media_dirs:
            check_dir(folder)
        RestartPolicy(self.max_engine_restarts)
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ConfigError("chat_template", Path(self.chat_template).name, "a file", flag="--chat-template")
        self._check_admin()
        self._check_tls()
        if not (self.api_keys or self.api_key_file or self.allow_insecure_bind or is_loopback(self.host)):
            raise ConfigError(
                "host",
                self.host,
                "a loopback address where no --api-key or --api-key-file is given",
                flag="--host, --api-key-file or --insecure-no-auth (--allow-insecure-bind)",
                code="insecure_bind",
            )

    @property
    def media(self) -> MediaLimits:
        """What is told of pictures, sounds and films."""
        limits = self.limits
        return MediaLimits(
            max_parts=limits.max_media_parts,
            max_bytes=limits.max_media_bytes,
            max_pixels=limits.max_image_pixels,
            max_side=limits.max_image_side,
            max_aspect=limits.max_image_aspect,
            max_frames=limits.max_video_frames,
            max_seconds=limits.max_audio_seconds,
            max_channels=limits.max_audio_channels,
            allowed_domains=tuple(domain.lower() for domain in self.allowed_media_domains),
            allowed_dirs=self.allowed_media_dirs,
            timeout_s=limits.media_timeout_s,
        )

    def _check_admin(self) -> None:
        if self.admin_port is None:
            return
        if not 0 <= self.admin_port <= 65535:
            raise ConfigError("admin_port", self.admin_port, "0..65535", flag="--admin-port")
        if self.admin_port == self.port != 0:
            raise ConfigError("admin_port", self.admin_port, f"another than port={self.port}", flag="--admin-port")
        if not self.admin_keys:
            limit = "a key for management, other than those of callers"
            raise ConfigError("admin_key", "none", limit, flag="--admin-key-file", code="missing_admin_key")
        if set(self.admin_keys) & set(self.api_keys):
            raise ConfigError("admin_key", "a key of callers", "another key", flag="--admin-key-file", code="conflict")

    def _check_tls(self) -> None:
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise ConfigError(name, Path(value).name, "a file", flag=flag_of(name))
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_certfile", "none", "a file beside the other --ssl flags", flag="--ssl-certfile")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
