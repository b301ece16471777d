"""The gate: may a merged model take the champion's place?

It chooses what the model is compared with and applies the rules of promotion, all of which must pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lewis.errors import InputError, nearest
from lewis.evaluation import rules
from lewis.evaluation.statistics.scored import Scored
from lewis.recipe.schema import Gate


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        reasons: one line per rule, `rule: number: pass` or `fail`.
        compared_with: the `uri` of the champion, or any other text if there was none. `promotion.promote` checks that
            the champion is still the same.
        numbers: the gate's metric of both, such as `gsm8k/acc,none 0.51 vs 0.48`; empty if they were not compared.
        metric: the gate's; empty if there is none, or it was not looked at.
        approve_hours: how long a person has to approve what passed; None: it is promoted at once.
    """

    passed: bool
    reasons: tuple[str, ...]
    compared_with: str
    numbers: str = ""
    metric: str = ""
    approve_hours: float | None = None

    @property
    def waits(self) -> bool:
        """Whether it passed, and a person has to approve it."""
        return self.passed and self.approve_hours is not None


@dataclass(frozen=True)
class Incumbent:
    """The version in use: its `uri`, and the digest of its merge."""

    uri: str
    digest: str


def judge(
    gate: Gate | None,
    models: Sequence[Scored],
    digest: str,
    *,
    champion: Incumbent | None = None,
    withdrawn: str | None = None,
    limit: float | None = None,
) -> Verdict:
    """Choose what a merged model is compared with, and apply the gate.

    The reference is the champion. Before there is one, it is the base, and without a base the best expert.

    Args:
        gate: as the recipe has it; None lets everything pass.
        models: everything that was scored, the merged model last. Not read if the gate is None.
        digest: of the merge.
        champion: the version in use, if there is one.
        withdrawn: why this very merge was rolled back by hand; None if it was not.
        limit: documents per task, if `evaluate.limit` is set.

    Raises:
        InputError, PairingError: as `decide`.
    """
    in_use = champion.uri if champion else "nothing"
    if champion and champion.digest == digest:
        return Verdict(True, ("this very model is the champion already",), in_use)
    if withdrawn is not None:
        told = f"this very model was rolled back by hand ({withdrawn}); only `lewis promote` brings it back: fail"
        return Verdict(False, (told,), in_use)
    if gate is None:
        return Verdict(True, ("no gate in the recipe",), in_use)
    ours, others = models[-1], {model.label: model for model in models[:-1]}
    base = others.get("base")
    if champion and "champion" not in others:
        lost = f"{champion.uri} must be scored again: its files or base are gone or damaged; see `lewis promote`: fail"
        return Verdict(False, (lost,), in_use)
    reference = others["champion"] if champion else base or _best(gate.metric, others)
    compared_with = champion.uri if champion else reference.label
    return decide(gate, ours, reference, compared_with, base=base, limit=limit)


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
        gate: as the recipe has it.
        candidate: the merged model.
        reference: the champion; before there is one, the base.
        compared_with: what the verdict calls the reference.
        base: what the guards compare with. If it is None, the guards that need it are left out.
        limit: documents per task, if `evaluate.limit` is set.

    Raises:
        InputError: if one of the two lacks the gate's metric, or a tolerance is for a task that does not exist.
        PairingError: if the two were not scored on the same documents.
    """
    for who, model in (("the candidate", candidate), (compared_with, reference)):
        if gate.metric not in model.by_name:
            hint = nearest(gate.metric, model.by_name) if model.by_name else "; there are no scores"
            raise InputError(f"register.gate.metric: expected a score of {who}, got {gate.metric!r}{hint}")
    found = rules.apply(gate, candidate, reference, base, limit)
    ours, theirs = candidate.by_name[gate.metric].value, reference.by_name[gate.metric].value
    numbers = f"{gate.metric} {ours:.4g} vs {theirs:.4g}"
    hours = gate.approve_hours if gate.approve else None
    passed = all(rule.passed for rule in found)
    return Verdict(passed, tuple(map(str, found)), compared_with, numbers, gate.metric, hours)


def _best(metric: str, parents: Mapping[str, Scored]) -> Scored:
    """The parent with the best value of the metric, to compare with where there is neither a champion nor a base."""
    known = {label: model.by_name[metric] for label, model in parents.items() if metric in model.by_name}
    if not known:
        return next(iter(parents.values()))
    higher = next(iter(known.values())).higher_is_better
    return parents[max(known, key=lambda label: known[label].value if higher else -known[label].value)]
