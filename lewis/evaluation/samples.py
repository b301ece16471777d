"""What an evaluation says of each document: the material of every comparison of two models."""

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
        weight: what the part counts in the metric's value: 1, or less in a group or a weighted mean.
        aggregation: `mean`, `perplexity`, `weighted_perplexity` or `bits_per_byte`, as lm-eval names them.
        documents: hashes.
        values: one per document: a number, a pair (log-likelihood, weight), or None where the metric left it out.
    """

    task: str
    weight: float
    aggregation: str
    documents: tuple[str, ...]
    values: tuple[Value, ...]

    def sums(self) -> NDArray[np.float64]:
        """Per document a numerator and a denominator: fp64, shape (documents, 2).

        Every aggregation is a function of the ratio of the two sums.
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
    """A metric's values of every document.

    Attributes:
        task: of a task, a group, or `weighted`.
        metric: lm-eval's key, metric and filter.
        parts: one for a task, one per member for a group or a weighted mean.
    """

    task: str
    metric: str
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        """`task/metric,filter`, as gates name it."""
        return f"{self.task}/{self.metric}"

    @property
    def count(self) -> int:
        """How many documents."""
        return sum(len(part.documents) for part in self.parts)

    def value(self) -> float:
        """The metric over all documents: lm-eval's number."""
        return float(sum(part.weight * part.aggregate(part.sums().sum(axis=0)) for part in self.parts))

    def is_finite(self) -> bool:
        """Whether no document has a NaN or an infinite value."""
        return all(bool(np.isfinite(part.sums()).all()) for part in self.parts)

    def weighted(self, factor: float) -> Iterator[Part]:
        """The parts, each counting `factor` times as much."""
        return (replace(part, weight=factor * part.weight) for part in self.parts)


@dataclass(frozen=True)
class Ends:
    """What the gate's guards look at, beside the scores.

    Attributes:
        empty: task that generates -> share of its documents with an empty answer.
        tried: number of smoke generations, greedy, from the tasks' first prompts.
        ended: how many of them came to an end token.
        perplexity: per token, over the first reference answers of the tasks; None where tasks have none.
    """

    empty: Mapping[str, float]
    tried: int
    ended: int
    perplexity: float | None


def read(content: Mapping[str, Any]) -> list[Samples]:
    """The samples in what the harness returned, of tasks and of groups.

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
    """The weighted sum of other metrics as one of its own."""
    return Samples(task, metric, tuple(part for each, weight in of for part in each.weighted(weight)))


def by_key(samples: Sequence[Samples]) -> dict[str, Samples]:
    """Samples by `task/metric,filter`."""
    return {each.key: each for each in samples}


def _value(value: Any) -> Value:
    return (float(value[0]), float(value[1])) if isinstance(value, list) else None if value is None else float(value)
