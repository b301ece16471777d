"""lm-eval's results and samples in a real MLflow database, by the logger that lm-eval could have itself."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.evaluation import mlflow_logger
from lewis.evaluation.mlflow_logger import MLflowLogger
from tests.conftest import Family

pytestmark = pytest.mark.slow

TASK = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "q",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": "n",
}


@pytest.fixture
def results(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What lm-eval gives for a tiny model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"q{n}", "n": n % 2}) + "\n" for n in range(12)))
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(TASK))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = {"model": "hf", "model_args": f"pretrained={family.math}", "device": "cpu"}
    found = lm_eval.simple_evaluate(**model, tasks=["sums"], task_manager=manager, log_samples=True)
    assert found is not None
    return dict(found)


def test_scores_settings_and_samples_of_an_evaluation(
    results: dict[str, Any], empty_database: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'mlflow.db')}"
    client = MlflowClient(uri)
    client.create_experiment("evals", artifact_location=(tmp_path / "artifacts").as_uri())
    logger = MLflowLogger(f"tracking_uri={uri},experiment=evals,run_name=tiny,step=3")
    logger.post_init(results)
    logger.log_eval_result()
    logger.log_eval_samples(results["samples"])
    logger.finish()

    experiment = client.get_experiment_by_name("evals")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.metrics["sums/acc"] == results["results"]["sums"]["acc,none"]
    assert run.data.metrics["sums/acc_stderr"] == results["results"]["sums"]["acc_stderr,none"]
    assert [each.step for each in client.get_metric_history(run.info.run_id, "sums/acc")] == [3]
    assert run.data.params["model"] == "hf" and run.data.params["sums/n-shot"] == "0"
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, [tag.value for tag in data.tags]) == ("sums", ["evaluation"])
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples/sums.json")).read_text())
    rows = [dict(zip(table["columns"], each, strict=True)) for each in table["data"]]
    assert [row["prompt"] for row in rows] == [f"q{n}" for n in range(12)]
    assert sum(row["acc"] for row in rows) / 12 == run.data.metrics["sums/acc"]
    whole = json.loads(Path(client.download_artifacts(run.info.run_id, "results.json")).read_text())
    assert whole["results"]["sums"]["acc,none"] == results["results"]["sums"]["acc,none"] and "samples" not in whole

    later = MLflowLogger({"tracking_uri": uri, "run_id": run.info.run_id, "step": 4})
    later.post_init(results | {"config": {**results["config"], "model_args": "pretrained=the next checkpoint"}})
    later.log_eval_result()
    later.log_eval_samples(results["samples"])
    assert [each.step for each in client.get_metric_history(run.info.run_id, "sums/acc")] == [3, 4]
    files = {each.path for folder in (None, "samples") for each in client.list_artifacts(run.info.run_id, folder)}
    assert files == {"results.json", "results_4.json", "samples", "samples/sums.json", "samples/sums_4.json"}
    assert "the next checkpoint" in Path(client.download_artifacts(run.info.run_id, "results_4.json")).read_text()


def test_it_stands_alone_and_refuses_what_it_does_not_know() -> None:
    imported = [node for node in ast.walk(ast.parse(Path(mlflow_logger.__file__).read_text()))]
    modules = {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    assert not any(str(module).startswith("lewis") for module in modules)
    with pytest.raises(ValueError, match=r"expected some of tracking_uri, .* got experimnet"):
        MLflowLogger("experimnet=evals")
    with pytest.raises(ValueError, match="got tracking_uri without a value"):
        MLflowLogger("tracking_uri,run_name=x")
    with pytest.raises(ValueError, match="step: expected a whole number, got 'ten'"):
        MLflowLogger("step=ten")
