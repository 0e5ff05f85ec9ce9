"""API keys: kept as hashes, compared in constant time, exchanged while the server runs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from common_platform.errors import ConfigError

MAX_FILE_BYTES = 65_536


def check_key(key: str) -> None:
    """Raise ConfigError for what cannot be a key; the key itself never stands in the error."""
    if not (8 <= len(key) <= 512 and key.isascii() and key.isprintable()) or " " in key:
        limit = "8..512 printable ASCII characters without spaces"
        raise ConfigError("api_key", f"{len(key)} characters", limit, flag="--api-key-file", code="invalid_api_key")


def read_keys(path: str | Path, flag: str = "--api-key-file") -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # are remarks.

    Raises:
        ConfigError: it cannot be read, has no key, or one that cannot be a key.
    """
    name = Path(path).name
    try:
        with Path(path).open("rb") as file:
            lines = file.read(MAX_FILE_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", name, "a readable text file", flag=flag) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError("api_key_file", name, "at least one key, one a line", flag=flag)
    for key in keys:
        check_key(key)
    return keys


class KeyRing:
    """The keys that open the server.

    Args:
        fixed: from the command line and the environment; path: of a file with more, which may be read again.
    """

    def __init__(self, fixed: Iterable[str], path: str | None = None) -> None:
        self._fixed = [_digest(key.encode()) for key in fixed]
        self._path = path
        self._from_file: list[bytes] = []
        if path is not None:
            self.reload()

    def __bool__(self) -> bool:
        return bool(self._fixed or self._from_file)

    def reload(self) -> None:
        """Take the file's keys as they are now.

        Raises:
            ConfigError: they cannot be used; those from before stay.
        """
        if self._path is not None:
            self._from_file = [_digest(key.encode()) for key in read_keys(self._path)]

    def tenant(self, key: bytes) -> str | None:
        """The name of the key, or None where it is none of ours. All are compared, so that the time tells nothing."""
        presented = _digest(key)
        matches = [hmac.compare_digest(presented, known) for known in (*self._fixed, *self._from_file)]
        return presented.hex()[:16] if any(matches) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
