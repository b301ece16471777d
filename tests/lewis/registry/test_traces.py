"""Traces: each answer is one, as MLflow itself would log it; a store without traces is a warning."""

import logging
from pathlib import Path

import pytest

from lewis.evaluation.documents import Document, SideBySide
from lewis.evaluation.statistics.scores import Texts
from lewis.registry import traces


def document(number: int, ours: str, theirs: str) -> Document:
    texts = [Texts(f"question {number}", "right é", answer) for answer in (ours, theirs)]
    return Document(("words", number, "x"), "words/acc,none", True, 1.0, 0.25, (), (texts[0], texts[1]))


BESIDE = SideBySide(
    "merged", "champion", (), (document(1, "right é", "wrong"), document(2, "same", "same"), document(3, "a", "b"))
)


@pytest.mark.slow
def test_answers_that_differ_are_traces_with_all_that_a_reader_filters_by(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("lewis", artifact_location=str(tmp_path))
    run = client.create_run(experiment).info.run_id
    traces.log(client, experiment, run, BESIDE, {"merged": "m-1"})
    found = client.search_traces(locations=[experiment], run_id=run)
    assert len(found) == 4 and len({each.info.trace_id for each in found}) == 4
    [one] = (each for each in found if each.info.request_metadata.get("mlflow.modelId") and each.data.response == '"a"')
    [span], info = one.data.spans, one.info
    assert (span.inputs, span.outputs, span.name) == ({"end of the prompt": "question 3"}, "a", "words: merged")
    assert (info.state.value, info.assessments[0].name, info.assessments[0].value) == ("OK", "expected", "right é")
    assert info.request_preview == '{"end of the prompt": "question 3"}' and info.response_preview == '"a"'
    own = {key: value for key, value in info.tags.items() if not key.startswith("mlflow.")}
    assert own == {"task": "words", "answer of": "merged", "words/acc,none": "1", "document": "2"}
    assert info.tags["mlflow.traceName"] == "words: merged"
    assert info.request_metadata["mlflow.trace.session"] == f"{run[:8]} words 3"
    assert len(client.search_traces(locations=[experiment], model_id="m-1")) == 2


@pytest.mark.slow
def test_a_store_that_refuses_traces_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    with caplog.at_level(logging.WARNING):
        traces.log(client, "7", "0" * 32, BESIDE, {})
    assert "answers of merged and champion are not all in MLflow's traces" in caplog.text
    assert "No Experiment with id=7" in caplog.text
