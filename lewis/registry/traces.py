"""Answers of two models to the same documents, as MLflow traces: its pages show them, and take people's feedback.

Each answer is a trace of its own, linked with the run that compared the models and with the model that gave it. The two
answers to one document form a session.
"""

import base64
import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lewis import private_names
from lewis.evaluation.documents import SideBySide

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Span, TraceInfo

logger = logging.getLogger(__name__)

MOST = 20  # documents
_MODEL, _RUN, _SESSION = "mlflow.modelId", "mlflow.sourceRun", "mlflow.trace.session"  # MLflow's metadata of traces


def log(client: "MlflowClient", experiment: str, run: str, beside: SideBySide, models: Mapping[str, str]) -> None:
    """Log two models' answers to documents as traces: those that differ in score first. Equal answers are left out.

    Args:
        client: of the tracking store.
        experiment, run: ids of the experiment, and of the run that compared the models.
        beside: the answers of the two models.
        models: label of a model -> id of its logged model, where there is one.
    """
    from mlflow.exceptions import MlflowException

    traces = private_names.MLFLOW_TRACES.get()(client.tracking_uri)
    spans: list[Span] = []
    shown = [each for each in beside.shown()[:MOST] if each.answers_differ]
    try:
        for number, each in enumerate(shown):
            assert each.texts is not None
            task, document, _ = each.name
            about = {_RUN: run, _SESSION: f"{run[:8]} {task} {document}"}
            for label, score, texts in zip(
                (beside.ours, beside.reference), (each.ours, each.theirs), each.texts, strict=True
            ):
                tags = {"task": task, "answer of": label, each.key: f"{score:.4g}", "document": f"{number + 1}"}
                model = {_MODEL: models[label]} if label in models else {}
                trace, span = _trace(
                    experiment, f"{task}: {label}", texts.prompt, texts.answer, texts.target, tags, about | model
                )
                traces.start_trace(trace)
                spans.append(span)
        if spans:  # after their traces: MLflow would write a trace twice if its spans were there first
            traces.log_spans(experiment, spans)
    except (MlflowException, NotImplementedError) as error:  # such as a server without traces
        logger.warning(
            "the answers of %s and %s are not all in MLflow's traces, the version itself is registered: %s",
            beside.ours,
            beside.reference,
            error,
        )


def _trace(
    experiment: str, title: str, prompt: str, answer: str, target: str, tags: Mapping[str, str], about: dict[str, str]
) -> "tuple[TraceInfo, Span]":
    """Make the trace of one answer, with the expected answer as an assessment, and its only span."""
    from mlflow.entities import Expectation, Span, TraceInfo, TraceLocation, TraceState

    number, now = uuid.uuid4(), time.time_ns()
    name, question = f"tr-{number.hex}", {"end of the prompt": prompt}
    info = TraceInfo(
        name,
        TraceLocation.from_experiment_id(experiment),
        now // 1_000_000,
        TraceState.OK,
        execution_duration=0,
        trace_metadata=about | {"mlflow.trace_schema.version": "3"},
        tags={**tags, "mlflow.traceName": title},
        assessments=[Expectation("expected", target)],
    )
    attributes: dict[str, Any] = {
        "mlflow.traceRequestId": name,
        "mlflow.spanType": "UNKNOWN",
        "mlflow.spanInputs": question,
        "mlflow.spanOutputs": answer,
    }
    span = Span.from_dict(
        {
            "trace_id": base64.b64encode(number.bytes).decode(),
            "span_id": base64.b64encode(number.bytes[:8]).decode(),
            "parent_span_id": None,
            "name": title,
            "start_time_unix_nano": now,
            "end_time_unix_nano": now,
            "status": {"code": "STATUS_CODE_OK", "message": ""},
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
            "events": [],
        }
    )
    return info, span
