"""A logger of lm-eval for MLflow, in the form of `lm_eval.loggers.WandbLogger` and `TrackioLogger`.

It needs nothing but MLflow and what lm-eval brings, so this file can be used alone, and taken into lm-eval as it is:

    results = lm_eval.simple_evaluate(model="hf", model_args="pretrained=...", tasks=["gsm8k"], log_samples=True)
    mlflow_logger = MLflowLogger("tracking_uri=http://127.0.0.1:5000,experiment=evals,run_name=gsm8k")
    mlflow_logger.post_init(results)
    mlflow_logger.log_eval_result()
    mlflow_logger.log_eval_samples(results["samples"])
    mlflow_logger.finish()
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

MAX_PARAM = 6000  # characters that MLflow takes as a parameter's value
BATCH = 100  # parameters, and metrics, of one request
_FORBIDDEN = re.compile(r"[^\w\-. :/]")
_CONFIG = ("model", "model_args", "batch_size", "device", "limit", "num_fewshot", "gen_kwargs", "random_seed")
_DATA = ("dataset_path", "dataset_name", "test_split", "validation_split")


class MLflowLogger:
    """Logs results and samples of lm-eval as a run of MLflow."""

    def __init__(self, init_args: str | dict[str, Any] | None = None) -> None:
        """Begin a run of MLflow, or continue one.

        Args:
            init_args: as a mapping, or as text like `--wandb_args`, `key=value,key=value`. `tracking_uri`: of the
                server or database; by default what `MLFLOW_TRACKING_URI` says. `experiment`: its name, `lm-eval` by
                default. `run_name`. `run_id`: of a run to continue; its parameters keep their values, and the names of
                added files end in the step. `step`: of the metrics, so that evaluations of one training plot as a line.

        Raises:
            ImportError: if MLflow is not installed.
            ValueError: if there is another key, a key without a value, or a step that is no whole number.
            MlflowException: if there is no such run.
        """
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ImportError("mlflow is not installed; install it with `pip install mlflow`") from error
        if isinstance(init_args, str):
            pairs = [each.partition("=") for each in init_args.split(",") if each]
            init_args = {key.strip(): value for key, _, value in pairs}
        given = dict(init_args or {})
        if without := [key for key, value in given.items() if value == ""]:
            raise ValueError(f"mlflow_args: expected key=value,key=value, got {', '.join(without)} without a value")
        known = ("tracking_uri", "experiment", "run_name", "run_id", "step")
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"mlflow_args: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        step = str(given.get("step") or 0)
        if not step.removeprefix("-").isdecimal():
            raise ValueError(f"mlflow_args: step: expected a whole number, got {step!r}")
        self.client, self.step = MlflowClient(given.get("tracking_uri")), int(step)
        self._begins = not given.get("run_id")
        self.run_id: str = given.get("run_id") or self._new_run(given.get("experiment") or "lm-eval", given)
        # MLflow never changes a parameter, and each checkpoint of a training has other `model_args`.
        self._params_before = set(self.client.get_run(self.run_id).data.params)
        self._ending = "" if self._begins else f"_{self.step}"

    def _new_run(self, experiment: str, given: dict[str, Any]) -> str:
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        return str(self.client.create_run(number, run_name=given.get("run_name")).info.run_id)

    def post_init(self, results: dict[str, Any]) -> None:
        """Keep the results that `lm_eval.simple_evaluate` returned, for the calls that log them."""
        self.results = copy.deepcopy(results)
        self.task_names = list(results.get("results", {}))
        self.group_names = list(results.get("groups", {}))
        self.task_configs: dict[str, Any] = self.results.get("configs", {})

    def log_eval_result(self) -> None:
        """Log scores and standard errors as metrics, settings as parameters, and all but the samples as a file."""
        from mlflow.entities import Metric, Param
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(name, value, now, self.step) for name, value in self._metrics()]
        known = self._params_before
        params = [Param(name, value[:MAX_PARAM]) for name, value in self._params() if value and name not in known]
        for start in range(0, max(len(params), len(metrics)), BATCH):
            end = start + BATCH
            self.client.log_batch(self.run_id, metrics[start:end], params[start:end])
        plain = {key: value for key, value in self.results.items() if key != "samples"}
        text = json.dumps(plain, indent=2, default=str, ensure_ascii=False)
        self.client.log_text(self.run_id, text, f"results{self._ending}.json")

    def log_eval_samples(self, samples: dict[str, list[dict[str, Any]]]) -> None:
        """Log the documents of each task as a table, `samples/TASK.json`, and the task's data as an input of the run.

        MLflow's page shows the tables of several runs side by side.

        Args:
            samples: task -> what lm-eval logs of each document.
        """
        import pandas as pd
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for task in self.task_names:
            if task in self.group_names or not samples.get(task):
                continue
            rows = [_row(each) for each in samples[task]]
            self.client.log_table(self.run_id, pd.DataFrame(rows), f"samples/{_name(task)}{self._ending}.json")
            hashes = "".join(str(each.get("doc_hash")) for each in samples[task])
            config = self.task_configs.get(task, {})
            source = {key: str(config[key]) for key in _DATA if config.get(key)}
            digest = hashlib.sha256(hashes.encode()).hexdigest()[:32]
            data = Dataset(_name(task), digest, "lm-eval", json.dumps(source))
            self.client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "evaluation")])])

    def finish(self) -> None:
        """End the run if this logger began it; a run that it continued keeps its state."""
        if self._begins:
            self.client.set_terminated(self.run_id)

    def _metrics(self) -> Iterator[tuple[str, float]]:
        for task, found in self.results.get("results", {}).items():
            for key, value in found.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield _name(f"{task}/{key.removesuffix(',none')}"), float(value)

    def _params(self) -> Iterator[tuple[str, str]]:
        config = self.results.get("config", {})
        for key in _CONFIG:
            if config.get(key) is not None:
                yield key, str(config[key])
        for part in ("n-shot", "versions"):
            for task, value in self.results.get(part, {}).items():
                yield _name(f"{task}/{part}"), str(value)
        yield "lm_eval_version", str(self.results.get("lm_eval_version") or "")


def _name(text: str) -> str:
    """A name with `_` in place of each character that MLflow forbids."""
    return _FORBIDDEN.sub("_", text)


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    """A document as a row: its number and hash, the prompt, the right answer, the model's, and its metrics."""
    arguments = sample.get("arguments") or [[""]]
    first = next(iter(arguments.values()), {}) if isinstance(arguments, dict) else arguments[0]
    prompt = next(iter(first.values()), "") if isinstance(first, dict) else first[0] if first else ""
    metrics = {key: sample[key] for key in sample.get("metrics") or () if key in sample}
    plain = {key: value if isinstance(value, int | float) else str(value) for key, value in metrics.items()}
    return {
        "doc_id": sample.get("doc_id"),
        "doc_hash": sample.get("doc_hash"),
        "filter": sample.get("filter"),
        "prompt": str(prompt),
        "target": str(sample.get("target")),
        "response": str(sample.get("filtered_resps") or sample.get("resps")),
        **plain,
    }
