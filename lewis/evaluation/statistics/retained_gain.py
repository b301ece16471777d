"""How much of each expert's gain over the base the merged model keeps on that expert's own task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lewis.evaluation.statistics.comparison import ROUNDING
from lewis.evaluation.statistics.scored import WEIGHTED_KEY, Scored, grouped_tasks
from lewis.evaluation.statistics.scores import Score

BASE, BASELINES = "base", ("uniform", "champion")  # labels in tables; no expert has one of them


@dataclass(frozen=True)
class Kept:
    """How much of one expert's gain on its own task the merged model keeps.

    Attributes:
        expert: its label.
        base, best, merged: the scores of the base, this expert and the merged model on the task's primary metric.
        fraction: the part of the gain that the merged model keeps, 1 if it is as good as the expert; NaN if it has no
            such score.
        baselines: the same fraction for `uniform` and `champion`, those of them that were scored on this metric.
    """

    expert: str
    base: Score
    best: Score
    merged: Score | None
    fraction: float
    baselines: Mapping[str, float]


def kept_gains(metric: str | None, models: Sequence[Scored]) -> list[Kept]:
    """How much of each expert's gain over the base the merged model keeps.

    A task belongs to the expert that scores best on it, if that expert beats the base; the first one wins a tie. Then

        kept = (merged - base) / (expert - base)

    on the task's primary metric, whether higher or lower is better. It is 1 if the merged model is as good as the
    expert, above 1 if it is better, and below 0 if it is worse than the base. A task on which no expert beats the base
    is left out. Scores that are not finite count as missing. The primary metric of a task is `metric` if that is one of
    its scores, else its first score. A group of tasks stands for its members, and the weighted mean is no task.

    Args:
        metric: `task/metric,filter`, such as the gate's metric; None: each task's first score is its primary metric.
        models: everything that was scored, the merged model last.

    Returns:
        one per task that belongs to an expert; nothing if the base or all experts are missing.
    """
    by_label = {model.label: model for model in models[:-1]}
    if BASE not in by_label:
        return []
    found = (_of_task(key, models[-1], by_label) for key in primary_metrics(models[-1], metric))
    return [each for each in found if each]


def kept_rows(found: Sequence[Kept]) -> list[dict[str, str]]:
    """The table of kept gains: one row per task, with scores, and kept gains in percent; `-` without a score."""
    labels = dict.fromkeys(label for each in found for label in each.baselines)
    return [
        {
            "expert": each.expert,
            "task": f"{each.best.key} {each.best.arrow}",
            "base": f"{each.base.value:.4g}",
            "expert's score": f"{each.best.value:.4g}",
            "merged": f"{each.merged.value:.4g}" if each.merged else "-",
            "kept": _percent(each.fraction),
            **{f"kept by {label}": _percent(each.baselines.get(label, math.nan)) for label in labels},
        }
        for each in found
    ]


def primary_metrics(model: Scored, preferred: str | None) -> list[str]:
    """One metric per task, by `task/metric,filter`: the preferred one, else the first. A group stands for its tasks."""
    members = grouped_tasks(model.samples)
    chosen: dict[str, str] = {}
    for key, score in model.by_name.items():
        if score.task not in members and key != WEIGHTED_KEY and (key == preferred or score.task not in chosen):
            chosen[score.task] = key
    return list(chosen.values())


def _of_task(key: str, ours: Scored, by_label: Mapping[str, Scored]) -> Kept | None:
    scores = {label: score for label, model in by_label.items() if (score := _finite(model, key))}
    experts = [label for label in scores if label not in (BASE, *BASELINES)]
    if BASE not in scores or not experts:
        return None
    base = scores[BASE]
    sign = 1 if base.higher_is_better else -1
    expert = max(experts, key=lambda label: sign * scores[label].value)
    gain = scores[expert].value - base.value
    if sign * gain <= ROUNDING:
        return None
    merged = _finite(ours, key)
    fractions = {label: (score.value - base.value) / gain for label, score in scores.items()}
    return Kept(
        expert=expert,
        base=base,
        best=scores[expert],
        merged=merged,
        fraction=(merged.value - base.value) / gain if merged else math.nan,
        baselines={label: fractions[label] for label in BASELINES if label in fractions},
    )


def _finite(model: Scored, key: str) -> Score | None:
    score = model.by_name.get(key)
    return score if score and math.isfinite(score.value) else None


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction)} %" if math.isfinite(fraction) else "-"
