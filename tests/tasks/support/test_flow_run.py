"""The state that a run ends in."""

import pickle

import pytest
from prefect.states import get_state_exception

from lewis_tasks.support import flow_run


def test_a_rejected_run_has_its_report_and_prefect_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_run, "_wait_for_ends", lambda: None)
    state = flow_run.ending("Rejected", "v2: 0 vs 1", {"version": 2})
    # The process of a worker's run raises it, so it ends with that sentence.
    raised = get_state_exception(state)
    assert isinstance(raised, flow_run.RejectedRun) and str(raised) == "v2: 0 vs 1"
    assert pickle.loads(pickle.dumps(raised)).report == flow_run.result_of_run(state) == {"version": 2}
    assert flow_run.result_of_run(flow_run.ending("Promoted", "v2: 1 vs 0", 7)) == 7
