"""``manifest.json``: what a hand-off artifact says about itself."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec

from common_platform.artifact import safe_files, strict_json
from common_platform.errors import (
    ArtifactDigestMismatch,
    ArtifactFormatError,
    ArtifactMissing,
    ArtifactRefused,
    ArtifactVersionError,
)

MANIFEST = "manifest.json"
BELONGS = "belongs_to"  # in a safetensors header: the manifest without which the file is not to be used
FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
CODE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".pyc", ".so")  # pickles, and programs


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    size: int  # bytes
    sha256: str  # hexadecimal


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sequence and what the trainer's model thought of it: ``logprobs[i]`` is of ``token_ids[i + 1]``."""

    token_ids: list[int]
    logprobs: list[float]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``files`` lists everything in the folder but the manifest itself."""

    format_version: int
    files: list[FileEntry]
    model: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    probes: list[Probe] = []

    def to_json(self) -> bytes:
        return json.dumps(msgspec.to_builtins(self), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``, checked in itself; the files are not looked at.

    Raises:
        ArtifactMissing, ArtifactFormatError, ArtifactVersionError, ArtifactRefused: by what is wrong.
    """
    data = safe_files.read_bytes(folder, MANIFEST, MAX_BYTES)
    try:
        found = strict_json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ArtifactFormatError(MANIFEST, str(error), "strict JSON") from error
    version = found.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise ArtifactVersionError("manifest.json format_version", version, f"1..{FORMAT_VERSION}; update this library")
    if version != FORMAT_VERSION:
        raise ArtifactFormatError("manifest.json format_version", version, f"{FORMAT_VERSION}")
    try:
        manifest = msgspec.convert(found, Manifest)
    except msgspec.ValidationError as error:
        raise ArtifactFormatError(MANIFEST, str(error), "the fields of a manifest") from error
    _check_entries(manifest)
    return manifest


def _check_entries(manifest: Manifest) -> None:
    names = set()
    for entry in manifest.files:
        safe_files.check_name(entry.name)
        if entry.name.lower() in names:
            raise ArtifactRefused(entry.name, "listed twice", "each file once")
        names.add(entry.name.lower())
        if entry.name.lower().endswith(CODE_SUFFIXES):
            kind = entry.name.rsplit(".", 1)[-1]
            raise ArtifactRefused(entry.name, f"a file of type .{kind}", "files that hold data: this type can run code")
        if entry.size < 0:
            raise ArtifactFormatError(f"{entry.name} size", entry.size, "0 bytes or more")
        if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise ArtifactFormatError(f"{entry.name} sha256", entry.sha256, "64 hexadecimal digits, 0..9 and a..f")
    for index, probe in enumerate(manifest.probes):
        if len(probe.logprobs) != len(probe.token_ids) - 1:
            raise ArtifactFormatError(f"probes[{index}]", len(probe.logprobs), f"{len(probe.token_ids) - 1} logprobs")


def verify(path: str | Path) -> Manifest:
    """Check every file of an artifact against its manifest.

    Raises:
        ArtifactMissing: a file is not there.
        ArtifactRefused: a file too many, a link, a name that leads outside.
        ArtifactFormatError: a file has another size.
        ArtifactDigestMismatch: a file has another digest.

    Cost: reads every byte once.
    """
    folder = Path(path)
    manifest = read_listed(folder)
    for entry in manifest.files:
        with safe_files.opened(folder, entry.name) as descriptor:
            check_file(entry, descriptor)
    return manifest


def read_listed(folder: Path) -> Manifest:
    """The manifest of ``folder``, which holds the files that it lists and no others; their content is not looked at."""
    manifest = read_manifest(folder)
    listed = {entry.name for entry in manifest.files} | {MANIFEST}
    present = set(safe_files.all_files(folder))
    for extra in sorted(present - listed):
        raise ArtifactRefused(extra, "not in manifest.json", "only files that are listed there")
    for missing in sorted(listed - present):
        raise ArtifactMissing(missing, "no such file", "every file that manifest.json lists")
    return manifest


def check_file(entry: FileEntry, descriptor: int) -> None:
    """Raise where what ``descriptor`` reads is not what ``entry`` says; the cheap thing is looked at first."""
    _check_size(entry, os.fstat(descriptor).st_size)
    _check_digest(entry, digest_of(descriptor))


def check_bytes(entry: FileEntry, data: bytes) -> None:
    """Raise where ``data`` is not the content that ``entry`` says."""
    _check_size(entry, len(data))
    _check_digest(entry, hashlib.sha256(data).hexdigest())


def _check_size(entry: FileEntry, size: int) -> None:
    if size != entry.size:
        raise ArtifactFormatError(f"{entry.name} size", f"{size} bytes", f"{entry.size} bytes, as in manifest.json")


def _check_digest(entry: FileEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise ArtifactDigestMismatch(entry.name, f"sha256 {digest[:16]}", f"{entry.sha256[:16]}, as in manifest.json")


def digest_of(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
