"""What the tests launch in the interpreter compiles for real devices: it is laxer than a compiler.

``nox -s kernels`` runs it after the interpreted tests, which write down what they launch (``launches.py``).
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from pathlib import Path

import pytest

from common_platform.kernels import TARGETS, is_interpreted

FOLDER = os.environ.get("KERNEL_LAUNCHES")
pytestmark = pytest.mark.skipif(
    not FOLDER or is_interpreted() or importlib.util.find_spec("triton") is None,
    reason="nox -s kernels compiles what its interpreted tests have launched",
)
DEVICES = ("sm_90", "gfx942")


def _launched():
    if not FOLDER or is_interpreted() or importlib.util.find_spec("triton") is None:
        return {}
    from tests.kernels.variants import read

    found = defaultdict(list)
    for variant in read(Path(FOLDER).glob("*.jsonl")):
        found[f"{variant.module.split('.')[0]}/{variant.module.split('.')[-2]}: {variant.kernel}"].append(variant)
    return dict(sorted(found.items()))


LAUNCHED = _launched()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", LAUNCHED)
def test_every_variant_that_the_tests_launch_compiles(kernel, device):
    from tests.kernels.variants import specialization_of

    from common_platform.kernels.compiling import compile_for

    wrong = []
    for variant in LAUNCHED[kernel]:
        specialization = specialization_of(variant)
        try:
            shared = compile_for(specialization, device).shared
        except Exception as error:  # noqa: BLE001 - all that do not compile are told at once
            wrong.append((specialization.title, repr(error)[-400:]))
            continue
        if shared > TARGETS[device].shared_limit:
            wrong.append((specialization.title, f"{shared} bytes of shared memory"))
    assert not wrong, "\n".join(map(str, wrong))


def test_the_tests_have_launched_kernels_of_every_kind():
    assert len(LAUNCHED) >= 30
