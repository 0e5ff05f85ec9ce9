"""How many pictures, sounds and films a request may bring, from where, and how large."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common_platform.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    max_parts: int = 16  # of a request
    max_bytes: int = 20_971_520  # of one, as it comes
    max_pixels: int = 33_554_432
    max_side: int = 16_384  # pixels
    max_aspect: int = 200  # the longer side over the shorter
    max_frames: int = 512  # of a film
    max_seconds: float = 600.0  # of sound
    max_channels: int = 8  # of sound
    allowed_domains: tuple[str, ...] = ()  # of URLs; none: no URL is taken
    allowed_dirs: tuple[str, ...] = ()  # absolute, of file: URLs; none: no file is opened
    timeout_s: float = 10.0  # to fetch one

    def __post_init__(self) -> None:
        for name in ("max_parts", "max_bytes", "max_pixels", "max_side", "max_aspect", "max_frames", "max_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "1 or more")
        if not self.max_seconds > 0:
            raise ConfigError("max_seconds", self.max_seconds, "more than 0 seconds", flag="--max-audio-seconds")
        if not self.timeout_s > 0:
            raise ConfigError("timeout_s", self.timeout_s, "more than 0 seconds", flag="--media-timeout-s")
        for domain in self.allowed_domains:
            check_domain(domain)
        for folder in self.allowed_dirs:
            check_dir(folder)


def check_dir(folder: str) -> None:
    """Raise ConfigError for what is no folder, or not spelt out: which files may be read is to be plain."""
    path = Path(folder)
    if not path.is_absolute() or not path.is_dir() or str(path.resolve()) != folder or path == Path("/"):
        limit = "folders, each as its absolute path without links"
        raise ConfigError("allowed_media_dirs", folder, limit, flag="--allowed-media-dirs")


def check_domain(domain: str) -> None:
    """Raise ConfigError for what is no host's name: all hosts at once cannot be allowed."""
    labels = domain.split(".")
    if not all(label.replace("-", "").isalnum() and label.isascii() for label in labels) or len(domain) > 253:
        raise ConfigError(
            "allowed_media_domains", domain, "names of hosts, each in full", flag="--allowed-media-domains"
        )
