"""How a product is cut into programs: by its shape alone, so that the same call always adds in the same order."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common_platform.errors import ConfigError
from servekit.kernels.tuning import Tuned, tuned

SMALL = 16  # tokens up to which reading the weight is what takes the time
PROGRAMS = 264  # to have at least: two for each multiprocessor of an H100
MOST_SPLITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """One program computes ``rows`` x ``cols`` of the output from one of ``splits`` parts of the input columns."""

    rows: int
    cols: int
    inner: int  # columns of a step
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


def tiles_for(tokens: int, out: int, width: int, inner: int, *, unpacks: bool = False) -> Tiles:
    """Safe tiles for any device.

    Few tokens: narrow tiles, and the input columns split until every multiprocessor reads some of the weight.
    Many: square tiles, whose operands are used again and again.

    Args:
        inner: the columns of a step that the weight's layout asks for.
        unpacks: weights become wider in registers, of which large tiles would have too few.
    """
    if tokens <= SMALL:
        cols = 64
        steps = -(-width // inner)
        splits = 1
        while splits < MOST_SPLITS and splits * 2 <= steps and -(-out // cols) * splits < PROGRAMS:
            splits *= 2
        return Tiles(rows=16, cols=cols, inner=inner, splits=splits, num_warps=4, num_stages=4)
    if tokens <= 64:
        return Tiles(rows=32 if tokens <= 32 else 64, cols=64, inner=inner)
    return Tiles(rows=64 if unpacks else 128, cols=128, inner=inner, num_warps=8, num_stages=3)


def measured_tiles(kernel: str, safe: Tiles, *, most_cols: int = 256, **shape: int) -> Tiles:
    """What ``servekit tune`` measured for ``shape``, else ``safe``; inner columns and splits stay.

    Raises:
        ConfigError: what was written down has more columns than ``most_cols``, which the weight's layout allows.
    """
    found = tuned(kernel, Tuned(safe.cols, safe.num_warps, safe.num_stages, safe.rows), **shape)
    if found.block_n > most_cols:
        raise ConfigError(f"{kernel}.block_n", found.block_n, f"at most {most_cols}: a tile has one scale a step")
    return replace(safe, rows=found.block_m, cols=found.block_n, num_warps=found.num_warps, num_stages=found.num_stages)
