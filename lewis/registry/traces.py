"""Answers of two models to the same documents, as traces of MLflow: its page shows them, and takes people's feedback.

Each answer is a trace of its own, linked with the run that compared the models and with the model that gave it. The two
of one document are a session.
"""

import logging
import os
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lewis.evaluation.documents import SideBySide

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MOST = 20  # documents
_MODEL, _RUN, _SESSION = "mlflow.modelId", "mlflow.sourceRun", "mlflow.trace.session"  # MLflow's metadata of traces


def log(client: "MlflowClient", experiment: str, run: str, beside: SideBySide, models: Mapping[str, str]) -> None:
    """Log the documents on which the two models differ, in score first; equal answers need no feedback.

    Args:
        client: of the tracking store, which is MLflow's current one.
        experiment, run: their ids.
        beside: the two models.
        models: label -> id of the logged model, where there is one.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # else a trace is not there yet when it is annotated
    random.seed()  # ids of traces are drawn from this generator, which lm-eval seeds where it runs in this process
    shown = [each for each in beside.shown(MOST) if each.answers_differ]
    for number, each in enumerate(shown):
        assert each.texts is not None
        task, document, _ = each.name
        about = {_RUN: run, _SESSION: f"{run[:8]} {task} {document}"}
        for label, score, texts in zip(
            (beside.ours, beside.reference), (each.ours, each.theirs), each.texts, strict=True
        ):
            tags = {"task": task, "answer of": label, each.key: f"{score:.4g}", "document": f"{number + 1}"}
            model = {_MODEL: models[label]} if label in models else {}
            span = mlflow.start_span_no_context(
                f"{task}: {label}",
                inputs={"end of the prompt": texts.prompt},
                tags=tags,
                metadata={**about, **model},
                experiment_id=experiment,
            )
            span.set_outputs(texts.answer)
            span.end()
            try:
                mlflow.log_expectation(trace_id=span.trace_id, name="expected", value=texts.target)
            except MlflowException as error:  # such as a server without traces; the version itself is registered
                logger.warning("the answers of %s are not in MLflow's traces: %s", label, error)
                return
