"""The gate: may a merged model take the champion's place?

Every rule is a line of the verdict with its number, and all of them must pass. Two copies of one model, however their
answers are drawn, pass the rule of superiority in at most one case of forty: its test of sign flips is exact for them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lewis.errors import InputError, nearest
from lewis.evaluation.comparison import LEVEL, holm
from lewis.evaluation.samples import Samples, by_key
from lewis.evaluation.scored import WEIGHTED, Scored, gain
from lewis.recipe.schema import Gate

CHANCE = 0.05  # largest p of a rule that holds
ROUNDING = 1e-9  # 0.57 - 0.55 is a little less than 0.02 in floating point
MORE_PERPLEXITY = 1.1  # times the base's
TOLERANCE = 0.05  # of a task that has none of its own


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        reasons: one line per rule, `rule: number: pass`.
        compared_with: for people; the `uri` of a champion, or any other text if there was none. `promote` checks that
            this still is so.
    """

    passed: bool
    reasons: tuple[str, ...]
    compared_with: str


@dataclass(frozen=True)
class _Rule:
    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{self.text}: {'pass' if self.passed else 'fail'}"


def decide(
    gate: Gate,
    candidate: Scored,
    reference: Scored,
    compared_with: str,
    *,
    base: Scored | None = None,
    limit: float | None = None,
) -> Verdict:
    """Apply the recipe's gate to a candidate.

    Args:
        gate: the rule.
        candidate: the merged model.
        reference: the champion; before there is one, the base.
        compared_with: what the verdict calls the reference.
        base: what the guards compare with; None leaves those out that need it.
        limit: documents per task, if the run was cut.

    Raises:
        InputError: if one of the two lacks the gate's metric, or a tolerance is for a task that there is not.
        PairingError: if the two were not scored on the same documents.
    """
    for who, model in (("the candidate", candidate), (compared_with, reference)):
        if gate.metric not in model.by_name:
            hint = nearest(gate.metric, model.by_name) if model.by_name else "; there are no scores"
            raise InputError(f"register.gate.metric: expected a score of {who}, got {gate.metric!r}{hint}")
    rules = [
        *_gain(gate, candidate, reference),
        *_non_inferiority(gate, candidate, reference),
        *_guards(candidate, reference, base),
        *_whole(gate, limit),
    ]
    return Verdict(all(rule.passed for rule in rules), tuple(map(str, rules)), compared_with)


def _superiority(gate: Gate) -> bool:
    """Who lets the metric fall does not ask for a gain."""
    return gate.min_gain >= 0 if gate.superiority is None else gate.superiority


def _gain(gate: Gate, candidate: Scored, reference: Scored) -> Iterator[_Rule]:
    ours, theirs = candidate.by_name[gate.metric], reference.by_name[gate.metric]
    new, old = ours.value, theirs.value
    passed = (new - old if ours.higher_is_better else old - new) >= gate.min_gain - ROUNDING  # NaN compares false
    direction = "gain" if ours.higher_is_better else "drop"
    yield _Rule(f"{gate.metric} must {direction} at least {gate.min_gain:g}: {new:.4f} vs {old:.4f}", passed)
    if _superiority(gate):
        found = gain(candidate, reference, gate.metric)
        text = (
            f"{gate.metric}, lower {LEVEL * 100:.0f} % bound of the paired gain must be above 0, p at most {CHANCE:g}"
        )
        if found is None:
            yield _Rule(f"{text}: it has no value per document", False)
        else:
            certain = found.low > 0 and found.p <= CHANCE
            yield _Rule(f"{text}: {found.low:+.4f}, p {found.p:.3g}", certain)


def _non_inferiority(gate: Gate, candidate: Scored, reference: Scored) -> Iterator[_Rule]:
    """Each task must be shown to be no worse than its tolerance allows; the family of tests is Holm's."""
    judged = {}
    for key, samples in _judged(gate, candidate).items():
        if (found := gain(candidate, reference, key)) is not None:
            judged[key] = (found, _tolerance(gate, samples, reference))
    adjusted = holm({key: found.p_inferior(tolerance) for key, (found, tolerance) in judged.items()})
    for key, (found, tolerance) in judged.items():
        yield _Rule(
            f"{key} must not be worse by {tolerance:.4g}: gain {found.delta:+.4f}, from {found.low:+.4f}, "
            f"Holm's p {adjusted[key]:.3g}",
            adjusted[key] <= CHANCE,
        )


def _judged(gate: Gate, candidate: Scored) -> dict[str, Samples]:
    """One metric per task, by key: that with a tolerance of its own, the gate's, or the task's first.

    A group stands for its members. The gate's own metric is left to the rule of superiority, where that applies.
    """
    weighted = "/".join(WEIGHTED)
    tasks: dict[str, tuple[tuple[bool, bool], Samples]] = {}
    groups = [each for each in candidate.samples if len(each.parts) > 1 and each.key != weighted]
    members = {part.task for each in groups for part in each.parts}
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
    """In the metric's own unit: a share of 1 for scores between 0 and 1, of the reference's value for all others."""
    given = gate.tolerance
    share = given.get(samples.key, given.get(samples.task, TOLERANCE)) if isinstance(given, Mapping) else given
    score = reference.by_name[samples.key]
    unit = 1.0 if score.higher_is_better and 0 <= score.value <= 1 else abs(score.value)
    allowed = -gate.min_gain if samples.key == gate.metric else 0.0
    return max(share * unit, allowed)


def _guards(candidate: Scored, reference: Scored, base: Scored | None) -> Iterator[_Rule]:
    """What no model may do, however good its scores."""
    ours = candidate.ends
    broken = [score for score in candidate.by_name.values() if not math.isfinite(score.value)]
    bad = len(broken) + sum(not samples.is_finite() for samples in candidate.samples)
    yield _Rule(f"no score may be NaN or infinite: {bad} of {len(candidate.scores)}", bad == 0)
    parent = base or reference
    for task, share in ours.empty.items():
        theirs = parent.ends.empty.get(task, 0.0)
        text = f"{task} must have no empty answers, or no more than {parent.label}"
        yield _Rule(f"{text}: {share:.1%} vs {theirs:.1%}", share <= theirs + ROUNDING)
    if ours.tried:
        words = f"a generation must come to its end: {ours.ended} of {ours.tried}"
        ends = parent.ends.ended
        yield _Rule(words if ends else f"{words}, and none of {parent.label}", ours.ended > 0 or not ends)
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
            yield _Rule(text, new <= MORE_PERPLEXITY * old)


def _whole(gate: Gate, limit: float | None) -> Iterator[_Rule]:
    if limit is not None:
        allowed = "allow_limit: true" if gate.allow_limit else "set register.gate.allow_limit to promote all the same"
        yield _Rule(f"all documents must be scored: evaluate.limit is {limit:g} ({allowed})", gate.allow_limit)
