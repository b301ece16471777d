"""The models of one evaluation side by side, and the table of how much the merged model gains on each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lewis.errors import InputError, nearest
from lewis.evaluation.statistics import power
from lewis.evaluation.statistics.comparison import Comparison, compare, interval, table_cells
from lewis.evaluation.statistics.scores import Ends, Evaluated, Samples, Score, Texts, by_key, combined, read_texts

WEIGHTED = ("weighted", "mean,none")  # task and metric of the weighted mean of `evaluate.weights`
WEIGHTED_KEY = "/".join(WEIGHTED)
OF_BOTH_KINDS = "evaluate.weights: some of these scores are better high, others low; weight one kind only"
MERGED = "merged"  # label of the merged model
_MARK = "mark"  # label of the version that the gate counts losses from; no table has it
_T = TypeVar("_T")


def without_mark(by_label: Mapping[str, _T]) -> dict[str, _T]:
    """All models but the mark, which only the gate needs: these are the ones that tables and files show."""
    return {label: each for label, each in by_label.items() if label != _MARK}


@dataclass(frozen=True)
class Scored:
    """One model of an evaluation.

    Attributes:
        label: its name in tables: `base`, an expert's name, `uniform`, `champion`, `merged`.
        key: identity of its content, as in `ModelFiles`.
        scores: one per task and metric.
        samples: the value of each document, for the metrics that can be compared.
        ends: what the gate's guards look at.
        texts: of some documents, as `read_texts`.
    """

    label: str
    key: str
    scores: tuple[Score, ...]
    samples: tuple[Samples, ...] = field(repr=False)
    ends: Ends
    texts: Mapping[tuple[str, str, int], Texts] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, label: str, key: str, found: Evaluated, weights: Mapping[str, float] | None = None) -> "Scored":
        """Read one model's results; with `weights`, the weighted mean is added to lm-eval's metrics.

        Raises:
            InputError: if a weight names a score that does not exist.
        """
        scores, samples = list(found.scores), list(found.samples)
        if weights:
            mean = _weighted(scores, by_key(samples), weights)
            scores.append(mean[0])
            samples.append(mean[1])
        return cls(label, key, tuple(scores), tuple(samples), found.ends, read_texts(found.content))

    @property
    def by_name(self) -> dict[str, Score]:
        """Scores by `task/metric,filter`."""
        return {score.key: score for score in self.scores}


def scores_of(models: Sequence[Scored]) -> dict[str, Sequence[Score]]:
    """Label -> scores, in the order of the models."""
    return {model.label: model.scores for model in models}


def gain(candidate: Scored, reference: Scored, key: str) -> Comparison | None:
    """Compare the candidate with a reference on one metric; None if a model has no samples of it.

    Raises:
        PairingError: if the two were not scored on the same documents.
    """
    ours, theirs = by_key(candidate.samples).get(key), by_key(reference.samples).get(key)
    if ours is None or theirs is None:
        return None
    return compare(ours, theirs, higher_is_better=candidate.by_name[key].higher_is_better, who=reference.label)


def comparison_rows(models: Sequence[Scored]) -> list[dict[str, str]]:
    """The table of a run: one row per metric and model, the last model against each of the others.

    A gain is positive if the last model is better, also where lower values are better. Its 95 % interval is from a
    paired bootstrap. Wins and losses count documents. p is from McNemar's exact test where all values are 0 or 1, else
    from random sign flips.

    Args:
        models: the merged model last.

    Raises:
        PairingError: if they were not scored on the same documents.
    """
    ours, rows = models[-1], []
    for key, score in ours.by_name.items():
        for model in models:
            if key not in model.by_name:
                continue
            found = None if model is ours else gain(ours, model, key)
            theirs = model.by_name[key]
            rows.append(
                {
                    "metric": f"{key} {score.arrow}",
                    "model": model.label,
                    "score": theirs.text,
                    **table_cells(found, ours.label),
                    "documents": str(theirs.samples),
                }
            )
    return rows


def grouped_tasks(samples: Sequence[Samples]) -> set[str]:
    """The members of groups that have samples as a whole, so that the group stands for these tasks."""
    groups = [each for each in samples if len(each.parts) > 1 and each.key != WEIGHTED_KEY]
    return {part.task for each in groups for part in each.parts}


def intervals(models: Sequence[Scored]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(label, task, metric) -> the 95 % interval of the score, if the metric has samples and the interval is finite."""
    found = {(m.label, s.task, s.metric): interval(s) for m in models for s in m.samples if s.count > 1}
    return {key: ends for key, ends in found.items() if all(map(math.isfinite, ends))}


def _weighted(
    scores: Sequence[Score], samples: Mapping[str, Samples], weights: Mapping[str, float]
) -> tuple[Score, Samples]:
    shares = list[tuple[Score, float]]()
    for name, weight in weights.items():
        score = next((each for each in scores if name in (each.key, each.task) and each.key in samples), None)
        if score is None:
            choices = [*samples, *{score.task for score in scores}]
            raise InputError(
                f"evaluate.weights: expected a task or a score with a value per document, got {name!r}"
                f"{nearest(name, choices)}"
            )
        shares.append((score, weight / sum(weights.values())))
    if len({score.higher_is_better for score, _ in shares}) > 1:
        raise InputError(OF_BOTH_KINDS)
    mean = combined(*WEIGHTED, [(samples[score.key], share) for score, share in shares])
    value = sum(share * score.value for score, share in shares)
    errors = power.sums_by_task((s.task, math.nan if s.stderr is None else share * s.stderr) for s, share in shares)
    spread = math.hypot(*errors.values())
    stderr = None if math.isnan(spread) else spread
    return Score(*WEIGHTED, value, stderr, shares[0][0].higher_is_better, mean.count), mean
