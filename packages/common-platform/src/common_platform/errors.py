"""One family of errors for the three packages.

Each error names the field, the value, the limit and what to change::

    raise ConfigError("cache.block_size", 24, "one of (8, 16, 32, 64)", flag="--block-size")
    # cache.block_size: got 24; allowed one of (8, 16, 32, 64); change with --block-size

``code`` is a stable snake_case word that programs may match on; messages may change.
"""

from __future__ import annotations

from typing import Any

MAX_VALUE_CHARS = 64
MAX_MESSAGE_CHARS = 400


def shown(value: object) -> str:
    """``value`` for a message: at most 64 characters, what does not print escaped."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:256])
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


class PlatformError(Exception):
    """The root of the family.

    Args:
        param: the faulty field as a dotted path, or None when no field is at fault.
        value: what was found there.
        limit: what would have been right, as a phrase ("1..16", "one of (8, 16)").
        code: stable snake_case word; each class has a default.
        flag: the flag or argument that changes the limit.
        message: the whole sentence, where the pattern above does not fit.
    """

    default_code = "error"

    def __init__(
        self,
        param: str | None = None,
        value: object = None,
        limit: str | None = None,
        *,
        code: str | None = None,
        flag: str | None = None,
        message: str | None = None,
    ) -> None:
        self.param = param
        self.value = value
        self.limit = limit
        self.flag = flag
        self.code = code or self.default_code
        super().__init__((message or self._sentence())[:MAX_MESSAGE_CHARS])

    def _sentence(self) -> str:
        parts = [f"{self.param}: got {shown(self.value)}" if self.param else shown(self.value)]
        if self.limit:
            parts.append(f"allowed {self.limit}")
        if self.flag:
            parts.append(f"change with {self.flag}")
        return "; ".join(parts)

    @property
    def message(self) -> str:
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: type, code, message, param, value, limit, flag."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "value": None if self.value is None else shown(self.value),
            "limit": self.limit,
            "flag": self.flag,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.param, self.value, self.limit, self.code, self.flag, self.message))


def _rebuild(
    kind: type[PlatformError],
    param: str | None,
    value: object,
    limit: str | None,
    code: str,
    flag: str | None,
    message: str,
) -> PlatformError:
    return kind(param, value, limit, code=code, flag=flag, message=message)


class ConfigError(PlatformError, ValueError):
    """A setting is out of range, in conflict, missing or unsafe. Command-line exit 3."""

    default_code = "invalid_config"


class RequestError(PlatformError, ValueError):
    """A request that its caller can mend; ``status`` is the HTTP status that answers it."""

    default_code = "invalid_request"
    status = 400

    def __init__(self, *args: Any, status: int = 400, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.status = status


class ResourceError(PlatformError, RuntimeError):
    """The environment lacks something: a port, a library, memory, disk. Exit 5."""

    default_code = "resource_missing"


class DeviceError(ResourceError):
    """A device is missing or cannot do what is asked of it."""

    default_code = "device_missing"


class ArtifactError(PlatformError, ValueError):
    """A hand-off artifact or model folder cannot be used. Exit 4."""

    default_code = "artifact_invalid"


class ArtifactMissing(ArtifactError):
    """A file that must be there is not."""

    default_code = "artifact_missing"


class ArtifactDigestMismatch(ArtifactError):
    """A file, or a probe, is not what the manifest says."""

    default_code = "artifact_digest_mismatch"


class ArtifactFormatError(ArtifactError):
    """A file cannot be read as what it claims to be."""

    default_code = "artifact_format"


class ArtifactShapeError(ArtifactError):
    """A tensor does not have the shape that the config asks for."""

    default_code = "artifact_shape"


class ArtifactConfigError(ArtifactError):
    """A key of a model's config has an impossible value."""

    default_code = "artifact_config"


class ArtifactVersionError(ArtifactError):
    """Written by a newer version of this library."""

    default_code = "artifact_version"


class ArtifactRefused(ArtifactError):
    """Readable, but not safe: code, links, paths that lead outside, pickles, non-finite weights."""

    default_code = "artifact_refused"


class CheckpointError(PlatformError, ValueError):
    """A training checkpoint cannot be used. Exit 4."""

    default_code = "checkpoint_invalid"


class CheckpointIncomplete(CheckpointError):
    """No complete checkpoint is there."""

    default_code = "checkpoint_incomplete"


class CheckpointCorrupt(CheckpointError):
    """A file of the checkpoint is damaged."""

    default_code = "checkpoint_corrupt"


class CheckpointVersionError(CheckpointError):
    """Written by a newer version of this library."""

    default_code = "checkpoint_version"


class CheckpointWorldSizeError(CheckpointError):
    """Saved with another number of ranks than it is read with."""

    default_code = "checkpoint_world_size"


class CheckpointWriteError(CheckpointError, OSError):
    """The checkpoint could not be written; the one before it is whole."""

    default_code = "checkpoint_write"


class WireError(PlatformError, ConnectionError):
    """A message between processes cannot be used."""

    default_code = "wire_error"


class WireFrameError(WireError):
    """The frame's length, shape or depth is not allowed."""

    default_code = "wire_frame"


class WireAuthError(WireError):
    """The message's MAC is wrong or missing."""

    default_code = "wire_auth"


class WireReplayError(WireError):
    """A message came twice or out of order."""

    default_code = "wire_replay"


class WireVersionError(WireError):
    """The peer speaks another version of the protocol."""

    default_code = "wire_version"


class WireTypeError(WireError):
    """The message does not fit the schema."""

    default_code = "wire_type"


class WireTimeout(WireError):
    """The peer did not answer in time."""

    default_code = "wire_timeout"


class DistError(PlatformError, RuntimeError):
    """A distributed job failed. Exit 6."""

    default_code = "distributed"


class RendezvousError(DistError):
    """The ranks could not find each other."""

    default_code = "rendezvous"


class RendezvousTimeout(RendezvousError):
    """Some rank did not arrive in time."""

    default_code = "rendezvous_timeout"


class RankLost(DistError):
    """A rank ended or fell silent."""

    default_code = "rank_lost"


class RankConflict(DistError):
    """Two processes claim one rank."""

    default_code = "rank_conflict"


class CollectiveMismatch(DistError):
    """The ranks called different collectives, or with different shapes."""

    default_code = "collective_mismatch"


class TrainingError(PlatformError, RuntimeError):
    """Training cannot go on. Exit 7."""

    default_code = "training_failed"


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite."""

    default_code = "non_finite_loss"


class UserCodeError(TrainingError):
    """The user's own code raised; its exception is ``__cause__``."""

    default_code = "user_code"


class ExportError(TrainingError):
    """An export could not be made or does not agree with the model."""

    default_code = "export_failed"


class EngineDead(PlatformError, RuntimeError):
    """The engine has stopped; nothing can be computed until it is started again."""

    default_code = "engine_dead"


class Overloaded(PlatformError, RuntimeError):
    """There is no room for this now; try again later."""

    default_code = "server_overloaded"


EXIT_CODES: list[tuple[type[PlatformError], int]] = [
    (ConfigError, 3),
    (RequestError, 3),
    (ArtifactError, 4),
    (CheckpointError, 4),
    (ResourceError, 5),
    (DistError, 6),
    (TrainingError, 7),
]


def exit_code(error: BaseException) -> int:
    """The command line's exit status for ``error``; 1 where it is our bug or the engine was lost."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
