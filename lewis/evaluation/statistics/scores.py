"""Scores: what lm-eval said of one model, and the table of several models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lewis.errors import LewisError
from lewis.evaluation.samples import Ends, Samples, read


@dataclass(frozen=True)
class Score:
    """One number of lm-eval.

    Attributes:
        metric: lm-eval's key of metric and filter, such as `exact_match,flexible-extract`.
        stderr: standard error; None where lm-eval gives none.
        samples: how many documents were scored.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    samples: int


@dataclass(frozen=True)
class Evaluated:
    """What lm-eval says of one model.

    Attributes:
        scores: every numeric metric of every task, and of every group that aggregates.
        samples: the value of each document, for every metric that is a function of two sums over the documents.
        ends: what the gate's guards look at.
        content: all of it as plain data, for the store.
    """

    scores: list[Score]
    samples: list[Samples]
    ends: Ends
    content: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: str, content: Mapping[str, Any]) -> "Evaluated":
        """Read what the harness returned, or what the store has of it.

        Args:
            model: for the error message.

        Raises:
            LewisError: if a score is not finite, or there is no score.
        """
        return cls(_scores(model, content), read(content), Ends(**content["ends"]), content)


def score_table(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, str]]:
    """One row per model, one column per task and metric, as `0.93 ± 0.02`; `*` marks the best of a column.

    The arrow in a column's name says which way is better.
    """
    columns = {(s.task, s.metric): s.higher_is_better for found in scores.values() for s in found}
    cells = {(model, s.task, s.metric): s for model, found in scores.items() for s in found}
    rows = [{"model": model} for model in scores]
    for (task, metric), higher in columns.items():
        values = [cells[key].value for key in cells if key[1:] == (task, metric)]
        best = max(values) if higher else min(values)
        for row in rows:
            score = cells.get((row["model"], task, metric))
            row[f"{task}/{metric} {'↑' if higher else '↓'}"] = _cell(score, best, mark=len(values) > 1)
    return rows


def _cell(score: Score | None, best: float, mark: bool) -> str:
    if score is None:
        return "-"
    spread = "" if score.stderr is None else f" ± {score.stderr:.2g}"
    return f"{score.value:.4g}{spread}" + (" *" if mark and score.value == best else "")


def _scores(model: str, result: Mapping[str, Any]) -> list[Score]:
    scores = []
    for task, found in result["results"].items():
        for key, value in found.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise LewisError(
                    f"{model}: {task}/{key} is {value}: look for NaN or Inf in the model's weights, "
                    "or in what a function of the task gives"
                )
            higher = result["higher_is_better"].get(task, {}).get(metric)
            stderr = found.get(f"{metric}_stderr,{filter_}")
            scores.append(
                Score(
                    task=task,
                    metric=key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    higher_is_better=higher is not False,
                    samples=int(found.get("sample_count", {}).get(key, found["sample_len"])),
                )
            )
    if not scores:
        raise LewisError(f"{model}: lm-eval gave no number for {', '.join(result['results'])}")
    return scores
