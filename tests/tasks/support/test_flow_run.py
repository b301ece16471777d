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


def test_what_the_server_gives_in_pages_is_read_to_its_end() -> None:
    """Of more than 200 deployments, the pauses of those beyond were not seen."""
    for there in (0, 199, 200, 450):
        known = list(range(there))
        assert list(flow_run.pages(lambda limit, offset, of=known: of[offset : offset + limit])) == known
