"""A search in MLflow: what was cut off while it was recorded."""

from pathlib import Path
from typing import Any

import pytest

from lewis.registry import tracking
from lewis.search import runs
from lewis.search.study import Objective, Trial


@pytest.mark.slow
def test_a_trial_whose_recording_was_cut_off_is_recorded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = tracking.log_numbers, list[str]()

    def cut_off(client: Any, run: str, *others: Any) -> None:
        calls.append(run)
        if len(calls) == 2:  # the first is the search's own
            raise KeyboardInterrupt
        real(client, run, *others)

    monkeypatch.setattr(tracking, "log_numbers", cut_off)
    trials = [Trial(0, {"parameters.lambda": 1.5}, "done", (0.5,)), Trial(1, {"parameters.lambda": 2}, "failed")]
    about = "tiny", "", {"a": "1"}, "d" * 64, [Objective("x/acc", True)], trials
    with pytest.raises(KeyboardInterrupt):
        runs.record(*about)
    parent = runs.record(*about)
    assert runs.record(*about) == parent and len(calls) == 4, "what was recorded is not recorded again"
    with tracking.client("the test") as client:
        found = client.search_runs([tracking.experiment(client)], f"tags.`mlflow.parentRunId` = '{parent}'")
    first, second = sorted(found, key=lambda run: str(run.data.tags["lewis.trial"]))
    assert first.info.run_id == calls[1] and first.data.params == {"parameters.lambda": "1.5"}
    assert (first.info.status, first.data.metrics["x/acc"], second.info.status) == ("FINISHED", 0.5, "FAILED")
