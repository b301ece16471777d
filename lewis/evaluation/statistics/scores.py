"""lm-eval's results of one model: scores and the value of each document; and the table of several models' scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lewis.errors import LewisError

HASH = 16  # hex digits kept of lm-eval's hash of a document: enough for one data set, in a quarter of the space
Value = float | tuple[float, float] | None


@dataclass(frozen=True)
class Part:
    """The values of one task's documents that a metric is made of.

    Attributes:
        task: its name.
        weight: of the part in the metric's value: 1, or less in a group or a weighted mean.
        aggregation: one of `lewis.rehearsal.values.SUMMED`.
        documents: a hash of each.
        values: one per document: a number, a pair (log-likelihood, weight), or None if the metric skips it.
    """

    task: str
    weight: float
    aggregation: str
    documents: tuple[str, ...]
    values: tuple[Value, ...]

    def sums(self) -> NDArray[np.float64]:
        """The numerator and the denominator of each document: fp64, shape (documents, 2).

        Every aggregation is a function of the ratio of the two sums over documents.
        """
        pairs = [(v, 1.0) if isinstance(v, float) else (0.0, 0.0) if v is None else v for v in self.values]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    def aggregate(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric's value, from the two sums over documents: fp64, shape (..., 2) -> (...)."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = sums[..., 0] / sums[..., 1]
            if self.aggregation == "mean":
                return ratio
            return -ratio / math.log(2) if self.aggregation == "bits_per_byte" else np.exp(-ratio)


@dataclass(frozen=True)
class Samples:
    """The values of one metric, document by document.

    Attributes:
        task: the name of a task or a group, or `weighted`.
        metric: lm-eval's key of metric and filter.
        parts: one for a task, one per member for a group or a weighted mean.
    """

    task: str
    metric: str
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        """`task/metric,filter`, as a recipe names it."""
        return f"{self.task}/{self.metric}"

    @property
    def count(self) -> int:
        """The number of documents, each counted once."""
        return sum(len(documents) for _, documents in {(part.task, part.documents) for part in self.parts})

    def value(self) -> float:
        """The metric over all documents, as lm-eval computes it."""
        return float(sum(part.weight * part.aggregate(part.sums().sum(axis=0)) for part in self.parts))

    def is_finite(self) -> bool:
        """Whether no document has a NaN or an infinite value."""
        return all(bool(np.isfinite(part.sums()).all()) for part in self.parts)


@dataclass(frozen=True)
class Ends:
    """What the gate's guards check, apart from the scores.

    Attributes:
        empty: name of a task that generates -> share of its documents with an empty answer.
        tried: how many greedy generations were made from the tasks' first prompts.
        ended: how many of these reached an end token.
        perplexity: per token, over the first reference answers of the tasks; None if there are no reference answers.
    """

    empty: Mapping[str, float]
    tried: int
    ended: int
    perplexity: float | None


def read_samples(content: Mapping[str, Any]) -> list[Samples]:
    """Read the samples of tasks and of groups from the harness's results.

    Args:
        content: `documents`, task -> hashes; `samples`, a mapping per task and metric; `groups`, group -> metric ->
            task -> weight.
    """
    found: dict[tuple[str, str], Samples] = {}
    for each in content["samples"]:
        documents = tuple(content["documents"][each["task"]])
        part = Part(each["task"], 1.0, each["aggregation"], documents, tuple(map(_value, each["values"])))
        found[each["task"], each["metric"]] = Samples(each["task"], each["metric"], (part,))
    for group, metrics in content["groups"].items():
        for metric, weights in metrics.items():
            if weights and all((task, metric) in found for task in weights):
                found[group, metric] = combined(group, metric, [(found[t, metric], w) for t, w in weights.items()])
    return list(found.values())


def places_of(documents: Sequence[str]) -> dict[tuple[str, int], int]:
    """The index of each document; the n-th of several equal documents has the key (document, n)."""
    seen: dict[str, int] = {}
    places = {}
    for place, document in enumerate(documents):
        seen[document] = seen.get(document, -1) + 1
        places[document, seen[document]] = place
    return places


def combined(task: str, metric: str, of: Sequence[tuple[Samples, float]]) -> Samples:
    """The weighted sum of several metrics, as a metric."""
    parts = (replace(part, weight=weight * part.weight) for each, weight in of for part in each.parts)
    return Samples(task, metric, tuple(parts))


@dataclass(frozen=True)
class Texts:
    """Texts of one document for people to read, cut: the end of the prompt, the right answer and the model's answer."""

    prompt: str
    target: str
    answer: str


def read_texts(content: Mapping[str, Any]) -> dict[tuple[str, str, int], Texts]:
    """Task, document and number among equal documents -> texts; empty if the harness kept none."""
    found: dict[tuple[str, str, int], Texts] = {}
    for task, texts in content.get("texts", {}).items():
        names = list(places_of(content["documents"][task]))
        found |= {
            (task, *names[each["document"]]): Texts(each["prompt"], each["target"], each["answer"]) for each in texts
        }
    return found


def by_key(samples: Sequence[Samples]) -> dict[str, Samples]:
    """Samples by `task/metric,filter`."""
    return {each.key: each for each in samples}


def _value(value: Any) -> Value:
    return (float(value[0]), float(value[1])) if isinstance(value, list) else None if value is None else float(value)


@dataclass(frozen=True)
class Score:
    """The value of one metric on one task or group, by lm-eval.

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

    @property
    def key(self) -> str:
        """`task/metric,filter`, as a recipe names it."""
        return f"{self.task}/{self.metric}"

    @property
    def arrow(self) -> str:
        """An arrow up if higher values are better, else an arrow down."""
        return "↑" if self.higher_is_better else "↓"

    @property
    def text(self) -> str:
        """The number with its standard error: `0.93 ± 0.02`."""
        return f"{self.value:.4g}" + ("" if self.stderr is None else f" ± {self.stderr:.2g}")


@dataclass(frozen=True)
class Evaluated:
    """lm-eval's results of one model.

    Attributes:
        scores: every numeric metric of every task, and of every group that aggregates.
        samples: the value of each document, for every metric that is a function of two sums over the documents.
        ends: what the gate's guards look at.
        content: all results as plain data, for the store.
    """

    scores: list[Score]
    samples: list[Samples]
    ends: Ends
    content: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: str, content: Mapping[str, Any]) -> "Evaluated":
        """Read the results of one model as the harness returned them or as the store keeps them.

        Raises:
            LewisError: if a score is not finite, or there is no score.
        """
        return cls(_scores(model, content), read_samples(content), Ends(**content["ends"]), content)


def score_table(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, str]]:
    """One row per model, one column per task and metric, as `0.93 ± 0.02`; `*` marks the best of a column.

    The arrow in a column's name says which way is better.
    """
    rows = [{"model": model} for model in scores]
    for each in {score.key: score for found in scores.values() for score in found}.values():
        cells = {model: score for model, found in scores.items() for score in found if score.key == each.key}
        values = [score.value for score in cells.values()]
        best = max(values) if each.higher_is_better else min(values)
        for row in rows:
            score = cells.get(row["model"])
            mark = " *" if score and len(values) > 1 and score.value == best else ""
            row[f"{each.key} {each.arrow}"] = f"{score.text}{mark}" if score else "-"
    return rows


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
