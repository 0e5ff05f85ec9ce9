from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.tiny import save_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[ServerProcess]:
    flags = ("--max-num-seqs", "32", "--pooling", "last", "--tool-call-parser", "hermes", "--reasoning-parser", "none")
    started = ServerProcess(model, *flags)
    yield started
    started.stop()
