"""Predict before a run what its gate can detect: margins, and which losses and gains the number of documents shows."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist

from lewis import settings
from lewis.evaluation.harness.check import without_values
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.rehearsed import Rehearsed, rehearsed
from lewis.evaluation.statistics import looks, power
from lewis.evaluation.statistics.scored import WEIGHTED_KEY
from lewis.recipe.schema import Evaluate, Gate
from lewis.redact import redacted

LATER = 10  # with policy `better`, the detectable gain is stated for the first version and for this one


def outlook(gate: Gate, evaluate: Evaluate, root: Path) -> list[str]:
    """Lines for a person about what the gate can detect, and which tasks it does not judge.

    Tasks whose number of documents is not known before the run, or whose score is not a share of right answers, are
    left out.

    Args:
        gate, evaluate: blocks of the recipe.
        root: the recipe's folder.

    Raises:
        InputError: if a task's files cannot be read.
    """
    lines: list[str] = [gate.policy]
    if evaluate.limit is not None and evaluate.documents != "by_release" and not gate.allow_limit:
        lines.append(f"evaluate.limit is {evaluate.limit:g}: no run can promote; set register.gate.allow_limit: true")
    settings = EvalSettings.of(evaluate, root)
    tasks = rehearsed(settings)
    unjudged = [name for name in without_values(tasks) if not tasks[name].group]
    judged = [name for name in settings.found().names if name not in unjudged]
    counted = {name: count for name in judged if name in tasks and (count := _documents_of(tasks[name], evaluate))}
    last = looks.look_at(evaluate.stop, None, counted)
    spreads = _spreads(gate, evaluate, counted)
    own = gate.metric if gate.metric == WEIGHTED_KEY else gate.metric.partition("/")[0]
    gains = {own} if gate.policy == "better" else set[str]()
    tests = len({*judged, own} - gains)
    for name, spread in spreads.items():
        about = f"{name}: {counted[name]} documents" if name in counted else name
        if name in gains:
            least = gate.min_gain
            first, later = (f"{power.gain_seen(spread, number, least):.2g}" for number in (1, LATER))
            lines.append(
                f"{about}, a gain of {first} is seen 8 times in 10, of {later} by the {LATER}th version in a row"
            )
            continue
        margin = _margin(gate, name, spread, tests)
        equal = NormalDist().cdf(margin / spread - NormalDist().inv_cdf(1 - power.ERROR * last.passing))
        loss = power.loss_seen(margin, spread)
        seen = f"a loss of {loss:.2g} is refused 8 times in 10" if loss else "it needs a larger register.gate.tolerance"
        lines.append(f"{about}, margin {margin:.2g}: an equal version passes {equal:.0%}, {seen}")
    lines += [f"{name} is not judged: none of its scores has a value per document" for name in unjudged]
    if evaluate.stop != "never" and (sizes := looks.sizes(last.of)):
        what = "is certain" if evaluate.stop == "known" else "is certain to be no"
        lines.append(f"scoring ends after {', '.join(map(str, sizes))} documents of each task, if the verdict {what}")
        if evaluate.completes:
            lines.append("what passes early is scored on all documents after its promotion")
    return [*lines, *_of_answers(gate)]


def _spreads(gate: Gate, evaluate: Evaluate, counted: Mapping[str, int]) -> dict[str, float]:
    """Task -> how far a score of so many documents differs by chance; the weighted score too, if it is judged."""
    spreads = {task: power.spread([(1.0, count)]) for task, count in counted.items()}
    whole = sum(evaluate.weights.values())
    parts = power.sums_by_task((name.partition("/")[0], weight / whole) for name, weight in evaluate.weights.items())
    if parts and gate.metric == WEIGHTED_KEY and parts.keys() <= counted.keys():
        spreads[WEIGHTED_KEY] = power.spread([(weight, counted[task]) for task, weight in parts.items()])
    return spreads


def _of_answers(gate: Gate) -> Iterator[str]:
    """Lines about the judge and the person whose answers a version that passes waits for."""
    if gate.judge:
        where = redacted(settings.JUDGE.get()) or "LEWIS_JUDGE, which is not set here"
        yield f"what passes is shown to the judge {gate.judge.model} at {where}"
    if gate.approve:
        yield f"what passes waits up to {gate.approve_hours:g} hours for a person"


def _margin(gate: Gate, name: str, spread: float, tests: int) -> float:
    given = gate.tolerance
    if isinstance(given, Mapping):
        own = [key for key in given if key.partition("/")[0] == name.partition("/")[0]]
        given = given[max(own, key=lambda key: "/" in key)] if own else None  # a metric's wins, as in the gate
    return power.margin(spread, tests) if given is None else given


def _documents_of(task: Rehearsed, evaluate: Evaluate) -> int | None:
    """The most documents a task can have; None if it is not known before a run, or a score is not a share."""
    shares = task.scores is not None and all(row.share for row in task.scores)
    if task.group or not shares or evaluate.documents not in ("all", "by_release"):
        return None
    limit, whole = evaluate.limit, task.documents
    if limit is None:
        return whole
    if limit < 1:
        return None if whole is None else math.ceil(whole * limit)
    return int(limit) if whole is None else min(whole, int(limit))
