"""The rules of promotion: each is a line with its number, and says whether it passed.

Two copies of one model, however their answers are drawn, pass the rule of superiority in at most one case of forty:
its test of sign flips is exact for them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lewis.errors import InputError, nearest
from lewis.evaluation.samples import Samples, by_key
from lewis.evaluation.statistics.comparison import LEVEL, holm
from lewis.evaluation.statistics.scored import WEIGHTED, Scored, gain, grouped_tasks
from lewis.recipe.schema import Gate

CHANCE = 0.05  # the largest p at which a test counts as passed
ROUNDING = 1e-9  # 0.57 - 0.55 is a little less than 0.02 in floating point
MORE_PERPLEXITY = 1.1  # the largest perplexity allowed, as a multiple of the base's
TOLERANCE = 0.05  # of a task for which the recipe gives none


@dataclass(frozen=True)
class RuleResult:
    """One rule: what it asks for and what was found, and whether that passes."""

    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{self.text}: {'pass' if self.passed else 'fail'}"


def apply(
    gate: Gate, candidate: Scored, reference: Scored, base: Scored | None = None, limit: float | None = None
) -> list[RuleResult]:
    """All rules of a gate, in the order of the verdict.

    Args:
        gate: as the recipe has it.
        candidate, reference: the models to compare; both have the gate's metric.
        base: what the guards compare with. If it is None, the guards that need it are left out.
        limit: documents per task, if `evaluate.limit` is set.

    Raises:
        InputError: if a tolerance is for a task or score that does not exist.
        PairingError: if the two were not scored on the same documents.
    """
    return [
        *_gain(gate, candidate, reference),
        *_non_inferiority(gate, candidate, reference),
        *_guards(candidate, reference, base),
        *_whole(gate, limit),
    ]


def _superiority(gate: Gate) -> bool:
    """Whether the gain must be significant; a negative `min_gain` switches this rule off by default."""
    return gate.min_gain >= 0 if gate.superiority is None else gate.superiority


def _gain(gate: Gate, candidate: Scored, reference: Scored) -> Iterator[RuleResult]:
    ours, theirs = candidate.by_name[gate.metric], reference.by_name[gate.metric]
    new, old = ours.value, theirs.value
    passed = (new - old if ours.higher_is_better else old - new) >= gate.min_gain - ROUNDING  # NaN compares false
    direction = "gain" if ours.higher_is_better else "drop"
    yield RuleResult(f"{gate.metric} must {direction} at least {gate.min_gain:g}: {new:.4f} vs {old:.4f}", passed)
    if _superiority(gate):
        found = gain(candidate, reference, gate.metric)
        text = (
            f"{gate.metric}, lower {LEVEL * 100:.0f} % bound of the paired gain must be above 0, p at most {CHANCE:g}"
        )
        if found is None:
            yield RuleResult(f"{text}: it has no value per document", False)
        else:
            certain = found.low > 0 and found.p <= CHANCE
            yield RuleResult(f"{text}: {found.low:+.4f}, p {found.p:.3g}", certain)


def _non_inferiority(gate: Gate, candidate: Scored, reference: Scored) -> Iterator[RuleResult]:
    """Tests that each task is worse by no more than its tolerance; p is adjusted by Holm for the number of tests."""
    judged = {}
    for key, samples in _judged(gate, candidate).items():
        if (found := gain(candidate, reference, key)) is not None:
            judged[key] = (found, _tolerance(gate, samples, reference))
    adjusted = holm({key: found.p_inferior(tolerance) for key, (found, tolerance) in judged.items()})
    for key, (found, tolerance) in judged.items():
        yield RuleResult(
            f"{key} must not be worse by {tolerance:.4g}: gain {found.delta:+.4f}, from {found.low:+.4f}, "
            f"Holm's p {adjusted[key]:.3g}",
            adjusted[key] <= CHANCE,
        )


def _judged(gate: Gate, candidate: Scored) -> dict[str, Samples]:
    """One metric per task, by `task/metric,filter`.

    It is the metric that has a tolerance of its own, else the gate's metric, else the task's first. A group is tested
    in place of its members. If the rule of superiority applies, the gate's metric is not tested here.
    """
    weighted = "/".join(WEIGHTED)
    tasks: dict[str, tuple[tuple[bool, bool], Samples]] = {}
    members = grouped_tasks(candidate.samples)
    named = gate.tolerance if isinstance(gate.tolerance, Mapping) else {}
    for each in candidate.samples:
        if each.key == weighted or (each.task in members and not {each.key, each.task} & set(named)):
            continue
        rank = (each.key in named, each.key == gate.metric)
        if each.task not in tasks or rank > tasks[each.task][0]:
            tasks[each.task] = (rank, each)
    chosen = {each.key: each for _, each in tasks.values()}
    unknown = [name for name in named if name not in chosen and name not in tasks]
    if unknown:
        known = [*tasks, *by_key(candidate.samples)]
        raise InputError(
            f"register.gate.tolerance: expected a task or a score with a value per document, got {unknown[0]!r}"
            f"{nearest(unknown[0], known)}"
        )
    if _superiority(gate):
        chosen.pop(gate.metric, None)
    return chosen


def _tolerance(gate: Gate, samples: Samples, reference: Scored) -> float:
    """In the metric's unit: absolute for a score from 0 to 1 that is better high, else relative to the reference."""
    given = gate.tolerance
    share = given.get(samples.key, given.get(samples.task, TOLERANCE)) if isinstance(given, Mapping) else given
    score = reference.by_name[samples.key]
    unit = 1.0 if score.higher_is_better and 0 <= score.value <= 1 else abs(score.value)
    allowed = -gate.min_gain if samples.key == gate.metric else 0.0
    return max(share * unit, allowed)


def _guards(candidate: Scored, reference: Scored, base: Scored | None) -> Iterator[RuleResult]:
    """What disqualifies a model, whatever its other scores."""
    ours = candidate.ends
    broken = [score for score in candidate.by_name.values() if not math.isfinite(score.value)]
    bad = len(broken) + sum(not samples.is_finite() for samples in candidate.samples)
    yield RuleResult(f"no score may be NaN or infinite: {bad} of {len(candidate.scores)}", bad == 0)
    parent = base or reference
    for task, share in ours.empty.items():
        theirs = parent.ends.empty.get(task, 0.0)
        text = f"{task} must have no empty answers, or no more than {parent.label}"
        yield RuleResult(f"{text}: {share:.1%} vs {theirs:.1%}", share <= theirs + ROUNDING)
    if ours.tried:
        count, ends = f"{ours.ended} of {ours.tried}", parent.ends.ended
        words = "a generation must come to its end" if ends else f"no generation of {parent.label} ends, so none must"
        yield RuleResult(f"{words}: {count}", ours.ended > 0 or not ends)
    if base is None:
        return
    numbers: dict[str, tuple[float | None, float | None]] = {
        "the reference answers' perplexity": (ours.perplexity, base.ends.perplexity)
    }
    for key, score in candidate.by_name.items():
        if "perplexity" in score.metric and key in base.by_name:
            numbers[key] = (score.value, base.by_name[key].value)
    for what, (new, old) in numbers.items():
        if new is not None and old is not None:
            text = f"{what} must be at most {MORE_PERPLEXITY:g} times the base's: {new:.4g} vs {old:.4g}"
            yield RuleResult(text, new <= MORE_PERPLEXITY * old)


def _whole(gate: Gate, limit: float | None) -> Iterator[RuleResult]:
    if limit is not None:
        allowed = "allow_limit: true" if gate.allow_limit else "set register.gate.allow_limit to promote all the same"
        yield RuleResult(f"all documents must be scored: evaluate.limit is {limit:g} ({allowed})", gate.allow_limit)
