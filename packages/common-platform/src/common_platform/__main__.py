"""``python -m common_platform``: the device report, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys

import torch

import common_platform
from common_platform.errors import PlatformError, exit_code
from common_platform.platforms import Platform, detect

GIB = 1 << 30


def report(platform: Platform) -> str:
    """The facts as lines of ``name  value``."""
    rows = [
        ("platform", f"{platform.name} (torch device {platform.device_type!r})"),
        *((f"device {d.index}", f"{d.name} {d.capability}".rstrip()) for d in platform.devices),
        *(
            (f"memory {d.index}", f"{d.memory_free / GIB:.1f} of {d.memory_total / GIB:.1f} GiB free")
            for d in platform.devices
        ),
        ("dtypes", ", ".join(platform.dtypes)),
        ("collectives", platform.collective_backend),
        ("graph capture", "yes" if platform.graph_capture else "no"),
        ("instructions", ", ".join(platform.isa) or "-"),
        ("threads", str(platform.num_threads)),
        *(("detection", line) for line in platform.found),
        ("versions", f"common-platform {common_platform.__version__}, torch {torch.__version__}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common_platform", description="What this machine can compute with."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for machines")
    arguments = parser.parse_args()
    try:
        platform = detect()
    except PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    print(json.dumps(platform.to_dict()) if arguments.json else report(platform))
    return 0


if __name__ == "__main__":
    sys.exit(main())
