"""One tree of loggers, in lines or in JSON."""

from __future__ import annotations

import io
import json
import logging

import pytest

from common_platform.errors import ConfigError
from common_platform.logging import TREES, configure, get_logger


@pytest.fixture(autouse=True)
def _restored():
    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in TREES}
    yield
    for name, (handlers, level) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.level, logger.propagate = handlers, level, True


def test_json_lines_hold_the_fields_and_the_rank():
    stream = io.StringIO()
    configure("info", as_json=True, rank=0, stream=stream)
    get_logger("servekit.engine").info("step %d", 3, extra={"tokens": 7})
    line = json.loads(stream.getvalue())
    assert (line["message"], line["logger"], line["rank"], line["tokens"]) == ("step 3", "servekit.engine", 0, 7)


def test_other_ranks_speak_only_to_warn():
    stream = io.StringIO()
    configure("info", rank=1, world_size=2, stream=stream)
    get_logger("trainkit").info("quiet")
    get_logger("trainkit").warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "[rank 1] trainkit: loud" in stream.getvalue()


def test_configuring_twice_does_not_double_lines():
    stream = io.StringIO()
    configure(stream=stream)
    configure(stream=stream)
    get_logger("common_platform").info("once")
    assert stream.getvalue().count("once") == 1


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="--log-level"):
        configure("shout")
