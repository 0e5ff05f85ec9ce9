"""The one place that opens a file of a folder by a name that came from outside."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common_platform.errors import ArtifactFormatError, ArtifactMissing, ArtifactRefused

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
MAX_PARTS = 4


def check_name(name: object) -> str:
    """``name`` if it is a relative path in our alphabet; hidden files, ``..`` and backslashes are not.

    Raises:
        ArtifactRefused: it is not.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= MAX_PARTS or not all(NAME.fullmatch(part) for part in parts):
        raise ArtifactRefused("file name", name, "letters, digits, '_', '.', '+', '-', at most 4 folders deep")
    return "/".join(parts)


@contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """A read-only descriptor of the regular file ``name``, each folder on the way opened without following links.

    Raises:
        ArtifactMissing: there is no such file.
        ArtifactRefused: a link, a device, a folder, or a file with a second name.
    """
    parts = check_name(name).split("/")
    descriptors: list[int] = []
    try:
        descriptors.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptors.append(os.open(part, flags, dir_fd=descriptors[-1]))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptors.append(os.open(parts[-1], flags, dir_fd=descriptors[-1]))
        _check_kind(name, os.fstat(descriptors[-1]))
        yield descriptors[-1]
    except FileNotFoundError as error:
        raise ArtifactMissing(name, "no such file", "the file that was written") from error
    except (OSError, NotADirectoryError) as error:
        what = "a symlink or no file" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise ArtifactRefused(name, what, "a regular file reached without links") from error
    finally:
        for descriptor in reversed(descriptors):
            os.close(descriptor)


def _check_kind(name: str, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise ArtifactRefused(name, stat.filemode(about.st_mode), "a regular file")
    if about.st_nlink != 1:
        raise ArtifactRefused(name, f"{about.st_nlink} names", "a file with one name (no hard links)")


def read_bytes(folder: Path, name: str, max_bytes: int = 100 << 20) -> bytes:
    """All of ``name``.

    Raises:
        ArtifactFormatError: it is longer than ``max_bytes``.
    """
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise ArtifactFormatError(name, f"{size} bytes", f"at most {max_bytes} bytes")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(max_bytes + 1)


def all_files(folder: Path) -> list[str]:
    """The names of everything in ``folder`` that is not a folder, sorted; links are not followed.

    Raises:
        ArtifactRefused: a link or a strange name is among them.
    """
    names = []
    for root, folders, files in os.walk(folder, followlinks=False):
        for entry in folders:
            if Path(root, entry).is_symlink():
                raise ArtifactRefused(entry, "a symlink", "a folder")
        names += [str(Path(root, file).relative_to(folder)) for file in files]
    return sorted(names)
