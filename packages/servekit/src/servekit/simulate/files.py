"""How the simulator's results are written."""

from __future__ import annotations

from pathlib import Path

import msgspec

from common_platform.errors import ResourceError


def write_json(body: msgspec.Struct, path: str | Path, name: str, *, flag: str) -> None:
    """Write ``body``; ``name`` and ``flag`` are what a caller knows ``path`` by.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(body), indent=1) + b"\n")
    except OSError as error:
        raise ResourceError(name, str(path), f"a file that can be written ({error})", flag=flag) from error
