"""The gate: may a merged model take the champion's place?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lewis.errors import InputError
from lewis.recipe_errors import nearest

ROUNDING = 1e-9  # 0.57 - 0.55 is a little less than 0.02 in floating point


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        reasons: one line per rule, `rule: number vs number: pass`.
        compared_with: for people; the `uri` of a champion makes `promote` check that it still is the champion.
    """

    passed: bool
    reasons: tuple[str, ...]
    compared_with: str


class Gate(Protocol):
    """The rule of promotion, as the recipe has it."""

    @property
    def metric(self) -> str: ...
    @property
    def min_gain(self) -> float: ...


def decide(
    gate: Gate | None,
    candidate: Mapping[str, float],
    reference: Mapping[str, float],
    compared_with: str,
    *,
    higher_is_better: bool = True,
) -> Verdict:
    """Apply the recipe's gate to two sets of scores, both by `task/metric,filter`.

    Raises:
        InputError: if one of the two lacks the gate's metric.
    """
    if gate is None:
        return Verdict(True, ("no gate in the recipe",), compared_with)
    for who, scores in (("the candidate", candidate), (compared_with, reference)):
        if gate.metric not in scores:
            hint = nearest(gate.metric, scores) if scores else "; there are no scores"
            raise InputError(f"register.gate.metric: expected a score of {who}, got {gate.metric!r}{hint}")
    new, old = candidate[gate.metric], reference[gate.metric]
    gain = new - old if higher_is_better else old - new
    passed = gain >= gate.min_gain - ROUNDING  # NaN compares false
    direction = "gain" if higher_is_better else "drop"
    reason = f"{gate.metric} must {direction} at least {gate.min_gain:g}: {new:.4f} vs {old:.4f}"
    return Verdict(passed, (f"{reason}: {'pass' if passed else 'fail'}",), compared_with)
