"""The states of a request: one table, one door."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servekit.core.request import HELD, NEXT_STATES, IllegalTransition, Request, RequestState
from servekit.sampling.parameters import SamplingParams


@given(st.lists(st.sampled_from(list(RequestState)), max_size=12))
def test_only_the_tables_transitions_are_possible(states):
    request = Request("r", [1], SamplingParams())
    for state in states:
        allowed = state in NEXT_STATES[request.state]
        before = request.state
        if allowed:
            request.move_to(state)
        else:
            with pytest.raises(IllegalTransition, match=before.value):
                request.move_to(state)
        assert request.state is (state if allowed else before)


def test_every_state_can_reach_the_end_and_finished_is_final():
    for state in RequestState:
        if state is not RequestState.FINISHED:
            assert RequestState.FINISHED in NEXT_STATES[state]
    assert NEXT_STATES[RequestState.FINISHED] == set()
    assert RequestState.WAITING not in HELD


def test_the_core_is_imported_without_torch():
    code = "import servekit.core.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
