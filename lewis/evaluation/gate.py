"""The gate: may a merged model take the champion's place?

It chooses what the model is compared with and applies the rules of promotion, all of which must pass. Each rule gives a
line with the numbers that it compares and whether it passed.

There are two policies. `better` asks for a significant gain. `not_worse` asks for none: each task must be within its
margin. All tasks must pass, so each is tested at the full level: a model that is worse by a margin on any task passes
in at most one case of twenty (an intersection-union test, Berger 1982).

Two things keep the verdicts on a long row of versions right. The *mark* is the last version that was found better than
the mark before it, or that a person chose: each version must be not worse than the champion and than the mark, so that
many small losses do not add up. And each version that is compared with the same mark may spend only a part of the error
of finding a version better (`statistics.power.spent`).

An evaluation may end before all documents are scored (`statistics.looks`). Then the gate looks at a part of them, with
a part of each test's error: the verdict is certain once all rules pass, or a test shows that a rule cannot pass.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lewis.errors import InputError, nearest
from lewis.evaluation.statistics import power
from lewis.evaluation.statistics.comparison import Comparison
from lewis.evaluation.statistics.looks import Look
from lewis.evaluation.statistics.scored import WEIGHTED_KEY, Scored, gain, grouped_tasks
from lewis.evaluation.statistics.scores import Part, Samples, Score, by_key, places_of
from lewis.recipe.schema import Gate

CHANCE = 0.05  # the largest p at which a test of one version counts as passed
ROUNDING = 1e-9  # 0.57 - 0.55 is a little less than 0.02 in floating point
MORE_PERPLEXITY = 1.1  # the largest perplexity allowed, as a multiple of the base's
TOLERANCE = 0.05  # relative, where the recipe gives none and the score is not a share
NO_DOCUMENTS = "it has no value per document"
WHOLE = Look()
NOTE = "note: "  # begins a line of a verdict that is no rule


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on a merged model.

    Attributes:
        reasons: one line per rule, `rule: number: pass` or `fail`; and notes, which begin with `NOTE`.
        compared_with: the `uri` of the champion, or any other text if there was none. `promotion.promote` checks that
            the champion is still the same.
        numbers: the gate's metric of both, such as `gsm8k/acc,none 0.51 vs 0.48`; empty if they were not compared.
        metric: the gate's metric; empty if there is no gate, or it did not look at scores.
        approve_hours: how long a person has to approve what passed; None: it is promoted immediately.
        luck: standard error of the score, in its unit: that of the gain divided by the square root of 2, as a gain is
            the difference of two scores. Negative if lower is better; None if unknown.
        mark: `uri` of the version that stays the mark if this one is promoted; empty: this one is the mark then.
        certain: whether further documents would not change the verdict.
    """

    passed: bool
    reasons: tuple[str, ...]
    compared_with: str
    numbers: str = ""
    metric: str = ""
    approve_hours: float | None = None
    luck: float | None = None
    mark: str = ""
    certain: bool = True

    @property
    def waits(self) -> bool:
        """Whether the model passed, and a person has to approve it."""
        return self.passed and self.approve_hours is not None


@dataclass(frozen=True)
class Incumbent:
    """A version that is or was in use: its `uri`, and the digest of its merge."""

    uri: str
    digest: str


@dataclass(frozen=True)
class Standing:
    """What the gate needs of the history of a registered model.

    Attributes:
        mark: the version that no later one may fall behind; None: there is no champion.
        number: 1 for the first version that is judged since the mark became the champion, 2 for the second.
        withdrawn: why this very merge was refused or rolled back by hand; None if it was not.
    """

    mark: Incumbent | None = None
    number: int = 1
    withdrawn: str | None = None


def judge(
    gate: Gate | None,
    models: Sequence[Scored],
    digest: str,
    *,
    champion: Incumbent | None = None,
    standing: Standing = Standing(),
    marked: Scored | None = None,
    limit: float | None = None,
    look: Look = WHOLE,
) -> Verdict:
    """Choose what a merged model is compared with, and apply the gate.

    The reference is the champion. Before there is one, it is the base, and without a base the best expert.

    Args:
        gate: as the recipe has it; None lets everything pass.
        models: everything that was scored, the merged model last. Not read if the gate is None.
        digest: of the merge.
        champion: the version in use, if there is one.
        standing: what the history says.
        marked: scores of the mark; None if there are none.
        limit: documents per task, if `evaluate.limit` is set.
        look: which part of the documents was scored; by default all.

    Raises:
        InputError, PairingError: as `decide`.
    """
    if found := _without_scores(gate, digest, champion, standing):
        return found
    assert gate is not None
    mark = standing.mark.uri if standing.mark else ""
    ours, others = models[-1], {model.label: model for model in models[:-1]}
    base = others.get("base")
    if champion and "champion" not in others:
        lost = f"{champion.uri} must be scored again: its files or base are gone or damaged; see `lewis promote`: fail"
        return Verdict(False, (lost,), champion.uri)
    reference = reference_of(gate.metric, others)
    compared_with = champion.uri if champion else reference.label
    behind = standing.mark if champion and standing.mark != champion else None
    known = _on_documents_of(ours, replace(marked, label=behind.uri)) if behind and marked else None
    found = decide(
        gate, ours, reference, compared_with, base=base, limit=limit, mark=known, number=standing.number, look=look
    )
    leads = _better(gain(ours, known or reference, gate.metric), _error_of_gain(standing.number, look))
    notes = [_lost(gate.metric, ours, model) for model in others.values() if model is not reference]
    if not champion and not leads:
        notes.append(f"{NOTE}no gain in {gate.metric} over {compared_with} is shown")
    if behind and not known:
        notes.append(f"{NOTE}{behind.uri} has no scores on these documents; losses are counted from here on")
    notes += [*_unjudged(gate, ours, reference), *_note_of(look)]
    stays = champion and not leads and (known or not behind)
    reasons = (*found.reasons, *filter(None, notes))
    # A first version differs from its base on more documents than from the next version.
    return replace(found, reasons=reasons, mark=mark if stays else "", luck=found.luck if champion else None)


def _without_scores(gate: Gate | None, digest: str, champion: Incumbent | None, standing: Standing) -> Verdict | None:
    """The verdict if it does not depend on scores, else None."""
    in_use = champion.uri if champion else "nothing"
    if champion and champion.digest == digest:
        mark = standing.mark.uri if standing.mark else ""
        return Verdict(True, ("this very model is the champion already",), in_use, mark=mark)
    if standing.withdrawn is not None:
        why = f"({standing.withdrawn}); only `lewis promote` brings it back"
        return Verdict(False, (f"this very model was refused or rolled back by hand {why}: fail",), in_use)
    return None if gate else Verdict(True, ("no gate in the recipe",), in_use)


def decide(
    gate: Gate,
    candidate: Scored,
    reference: Scored,
    compared_with: str,
    *,
    base: Scored | None,
    limit: float | None = None,
    mark: Scored | None = None,
    number: int = 1,
    look: Look = WHOLE,
) -> Verdict:
    """Apply the recipe's gate to a candidate.

    Args:
        gate: as the recipe has it.
        candidate: the merged model.
        reference: the champion; before there is one, the base.
        compared_with: what the verdict calls the reference.
        base: what the guards compare with. If it is None, the guards that need it are left out.
        limit: documents per task, if `evaluate.limit` is set.
        mark: an earlier champion that the candidate may not fall behind either.
        number: as `Standing.number`.
        look: as of `judge`.

    Raises:
        InputError: if one of the two lacks the gate's metric, or a tolerance is for a task that does not exist.
        PairingError: if two models were not scored on the same documents.
    """
    for who, model in (("the candidate", candidate), (compared_with, reference)):
        if gate.metric not in model.by_name:
            hint = nearest(gate.metric, model.by_name) if model.by_name else "; there are no scores"
            raise InputError(f"register.gate.metric: expected a score of {who}, got {gate.metric!r}{hint}")
    found = [
        *(_gain(gate, candidate, reference, number, look) if gate.policy == "better" else ()),
        *_not_worse(gate, candidate, reference, look),
        *(_not_worse(gate, candidate, mark, look, f" than {mark.label}") if mark else ()),
        *_guards(candidate, reference, base),
        *_whole(gate, limit),
    ]
    ours, theirs = candidate.by_name[gate.metric].value, reference.by_name[gate.metric].value
    numbers = f"{gate.metric} {ours:.4g} vs {theirs:.4g}"
    numbers += "" if look.documents is None else f" on {look.documents} of {look.of} documents"
    hours = gate.approve_hours if gate.approve else None
    passed = look.passing > 0 and all(rule.passed for rule in found)
    compared = gain(candidate, reference, gate.metric)
    luck = compared.spread / math.sqrt(2) if compared and math.isfinite(compared.spread) else None
    luck = -luck if luck and not candidate.by_name[gate.metric].higher_is_better else luck
    certain = look.documents is None or passed or any(rule.lost for rule in found)
    return Verdict(passed, tuple(map(str, found)), compared_with, numbers, gate.metric, hours, luck, certain=certain)


def reference_of(metric: str | None, others: Mapping[str, Scored]) -> Scored:
    """What a merged model is compared with, by label: the champion, else the base, else the best expert."""
    return others.get("champion") or others.get("base") or _best(metric, others)


def _best(metric: str | None, parents: Mapping[str, Scored]) -> Scored:
    """The parent with the best value of the metric, to compare with where there is neither a champion nor a base."""
    known = {label: model.by_name[metric] for label, model in parents.items() if metric in model.by_name}
    if not known:
        return next(iter(parents.values()))
    higher = next(iter(known.values())).higher_is_better
    return parents[max(known, key=lambda label: known[label].value if higher else -known[label].value)]


@dataclass(frozen=True)
class RuleResult:
    """One rule: what it asks for and what was found, whether it passed, and whether it can never pass (`lost`)."""

    text: str
    passed: bool
    lost: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {'pass' if self.passed else 'fail'}"


def _better(found: Comparison | None, error: float) -> bool:
    """Whether a comparison shows a gain, with a two-sided p of at most `error`."""
    return found is not None and found.delta > 0 and found.p <= error


def _error_of_gain(number: int, look: Look) -> float:
    """The largest two-sided p at which the gain of the `number`-th version compared with one mark is significant."""
    return 2 * power.spent(number) * look.passing


def _gain(gate: Gate, candidate: Scored, reference: Scored, number: int, look: Look) -> Iterator[RuleResult]:
    ours, theirs = candidate.by_name[gate.metric], reference.by_name[gate.metric]
    new, old = ours.value, theirs.value
    passed = (new - old if ours.higher_is_better else old - new) >= gate.min_gain - ROUNDING  # NaN compares false
    direction, found = "gain" if ours.higher_is_better else "drop", gain(candidate, reference, gate.metric)
    unseen = found.p_unseen(gate.min_gain) if found and gate.min_gain else 0.0
    lost = found is not None and max(found.p_superior(gate.min_gain), unseen) < CHANCE * look.failing
    error, values = _error_of_gain(number, look), f"{new:.4f} vs {old:.4f}"
    if look.documents and gate.min_gain:  # a gain that ends an evaluation early may be luck: test it
        p = 1.0 if found is None else 1 - found.p_superior(gate.min_gain)
        passed, values = p <= error / 2, f"{values}, p {p:.3g}"
    yield RuleResult(f"{gate.metric} must {direction} at least {gate.min_gain:g}: {values}", passed, lost)
    text = f"{gate.metric} must be better with p at most {error:.2g}"
    text += f" (comparison {number})" if number > 1 else ""
    numbers = f"gain {found.delta:+.4f}, from {found.low:+.4f}, p {found.p:.3g}" if found else NO_DOCUMENTS
    yield RuleResult(f"{text}: {numbers}", _better(found, error))


def _not_worse(gate: Gate, candidate: Scored, reference: Scored, look: Look, than: str = "") -> Iterator[RuleResult]:
    """Test for each task that it is worse by no more than its margin."""
    judged = _judged(gate, candidate)
    for key, samples in judged.items():
        found = gain(candidate, reference, key)
        if found is None:
            continue
        score = reference.by_name[key]
        if not score.value and not score.higher_is_better:  # a margin relative to 0 is 0
            passed = found.delta >= 0 and look.documents is None
            yield RuleResult(f"{key} must not be worse{than}: 0 before, gain {found.delta:+.4f}", passed)
        else:
            margin = _margin(gate, samples, reference, len(judged), look)
            p = found.p_inferior(margin)
            lost = found.p_superior(-margin) < CHANCE * look.failing
            if look.documents is not None or _is_share(score):
                p = max(p, found.p_unseen(margin))
            numbers = f"gain {found.delta:+.4f}, from {found.low:+.4f}, p {p:.3g}"
            text = f"{key} must not be worse{than} by {margin:.4g}: {numbers}"
            yield RuleResult(text, p <= CHANCE * look.passing, lost)
    if gate.policy == "not_worse" and gate.metric not in judged:
        yield RuleResult(f"{gate.metric} must not be worse{than}: {NO_DOCUMENTS}", False)


def _judged(gate: Gate, candidate: Scored) -> dict[str, Samples]:
    """The metrics that must not be worse, by `task/metric,filter`: of each task, and the gate's metric.

    A task's metrics are those with a tolerance of their own, else the gate's, else the task's first. A group stands for
    those members that have no tolerance. The policy `better` leaves the gate's metric out: its gain is tested instead.
    """
    tasks = defaultdict[str, list[Samples]](list)
    members = grouped_tasks(candidate.samples)
    named = gate.tolerance if isinstance(gate.tolerance, Mapping) else {}
    for each in candidate.samples:
        if {each.key, each.task} & set(named) or (each.key != WEIGHTED_KEY and each.task not in members):
            tasks[each.task].append(each)
    chosen = dict[str, Samples]()
    for of in tasks.values():
        first = max(of, key=lambda each: each.key == gate.metric)
        chosen |= by_key([each for each in of if each.key in named] or [first])
    if unknown := [name for name in named if name not in chosen and name not in tasks]:
        known = [*tasks, *by_key(candidate.samples)]
        raise InputError(
            f"register.gate.tolerance: expected a task or a score with a value per document, got {unknown[0]!r}"
            f"{nearest(unknown[0], known)}"
        )
    own = chosen.pop(gate.metric, by_key(candidate.samples).get(gate.metric))
    return {gate.metric: own, **chosen} if own and gate.policy == "not_worse" else chosen


def _unjudged(gate: Gate, candidate: Scored, reference: Scored) -> Iterator[str]:
    """A note for each task that no rule compares, since no score of it has a value per document, with its scores."""
    judged = {each.task for each in candidate.samples} | {candidate.by_name[gate.metric].task}
    numbers, theirs = defaultdict[str, list[str]](list), reference.by_name
    for key, score in candidate.by_name.items():
        if score.task not in judged:
            other = f" vs {theirs[key].value:.4g}" if key in theirs else ""
            numbers[score.task].append(f"{score.metric} {score.value:.4g}{other}")
    for task, found in numbers.items():
        yield f"{NOTE}{task} is not judged, since {NO_DOCUMENTS}: {'; '.join(found)}"


def _margin(gate: Gate, samples: Samples, reference: Scored, tests: int, look: Look) -> float:
    """The margin in the metric's unit: absolute for a score from 0 to 1 where higher is better, else relative."""
    score, given = reference.by_name[samples.key], gate.tolerance
    share = _is_share(score)
    if isinstance(given, Mapping):
        given = given.get(samples.key, given.get(samples.task))
    if given is None and share:
        theirs = by_key(reference.samples)[samples.key]
        errors = power.sums_by_task((part.task, part.weight / math.sqrt(_count(part, look))) for part in theirs.parts)
        return power.margin(power.spread((error, 1) for error in errors.values()), tests)
    return (TOLERANCE if given is None else given) * (1.0 if share else abs(score.value))


def _is_share(score: Score) -> bool:
    return score.higher_is_better and 0 <= score.value <= 1


def _count(part: Part, look: Look) -> float:
    """How many documents of a task have a value: of all documents, if only a part was scored, the same share as of it.

    It is at least 1.
    """
    scored = sum(value is not None for value in part.values) / len(part.documents)
    return max(look.pools.get(part.task, len(part.documents)) * scored, 1.0)


def _on_documents_of(candidate: Scored, other: Scored) -> Scored | None:
    """The other model's values on the documents of the candidate; None if it lacks a metric or a document."""
    theirs, found = by_key(other.samples), list[Samples]()
    for each in candidate.samples:
        parts = list[Part]()
        for ours, part in zip(each.parts, theirs[each.key].parts if each.key in theirs else (), strict=False):
            place, wanted = places_of(part.documents), places_of(ours.documents)
            if not wanted.keys() <= place.keys():
                return None
            parts.append(replace(ours, values=tuple(part.values[place[name]] for name in wanted)))
        if [part.task for part in parts] != [part.task for part in each.parts]:
            return None
        found.append(replace(each, parts=tuple(parts)))
    return replace(other, samples=tuple(found))


def _note_of(look: Look) -> list[str]:
    """A note if only a part of the documents was scored; else empty."""
    if not look.documents:
        return []
    part = f"{look.passing:.1%}" if look.passing else "none"
    return [
        f"{NOTE}{look.documents} of {look.of} documents of each task were scored, which was enough to know; "
        f"a pass may spend {part} of each test's error here"
    ]


def _lost(metric: str, candidate: Scored, other: Scored) -> str:
    """A note if another model of the run is significantly better; else empty."""
    found = gain(candidate, other, metric) if metric in other.by_name else None
    if found is None or found.delta >= 0 or found.p > CHANCE:
        return ""
    return f"{NOTE}{other.label} is better: {metric} {found.delta:+.4f}, p {found.p:.3g}"


def _guards(candidate: Scored, reference: Scored, base: Scored | None) -> Iterator[RuleResult]:
    """Check what disqualifies a model whatever its scores: NaN, empty answers, endless generations, perplexity."""
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
