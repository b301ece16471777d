"""The value of each document in an evaluation, which every comparison of two models is computed from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Value = float | tuple[float, float] | None


@dataclass(frozen=True)
class Part:
    """One task's documents within a metric.

    Attributes:
        task: its name.
        weight: of the part in the metric's value: 1, or less in a group or a weighted mean.
        aggregation: `mean`, `perplexity`, `weighted_perplexity` or `bits_per_byte`, as lm-eval names them.
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

        Summed over documents, every aggregation is a function of their ratio.
        """
        pairs = [(v, 1.0) if isinstance(v, float) else (0.0, 0.0) if v is None else v for v in self.values]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    def aggregate(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The value for sums over documents: fp64, shape (..., 2) -> (...)."""
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
        """How many documents."""
        return sum(len(part.documents) for part in self.parts)

    def value(self) -> float:
        """The metric over all documents, as lm-eval computes it."""
        return float(sum(part.weight * part.aggregate(part.sums().sum(axis=0)) for part in self.parts))

    def is_finite(self) -> bool:
        """Whether no document has a NaN or an infinite value."""
        return all(bool(np.isfinite(part.sums()).all()) for part in self.parts)

    def weighted(self, factor: float) -> Iterator[Part]:
        """The parts, with `factor` times their weight."""
        return (replace(part, weight=factor * part.weight) for part in self.parts)


@dataclass(frozen=True)
class Ends:
    """What the gate's guards check beside the scores.

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


def read(content: Mapping[str, Any]) -> list[Samples]:
    """The samples of tasks and of groups, from what the harness returned.

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


def combined(task: str, metric: str, of: Sequence[tuple[Samples, float]]) -> Samples:
    """The weighted sum of several metrics, as a metric."""
    return Samples(task, metric, tuple(part for each, weight in of for part in each.weighted(weight)))


def by_key(samples: Sequence[Samples]) -> dict[str, Samples]:
    """Samples by `task/metric,filter`."""
    return {each.key: each for each in samples}


def _value(value: Any) -> Value:
    return (float(value[0]), float(value[1])) if isinstance(value, list) else None if value is None else float(value)
