"""Make the moves of a fit longer, where that brings the merged model closer to the experts.

A ridge makes a fit's moves W - W_0 too short, and so does rounding that later projections are fitted around. So all
fitted projections of the blocks become W_0 + c (W - W_0) at once. Which c is decided by the KL divergence from what
each expert predicts on its held-back rows: c rises in steps of `STEP` for as long as the divergence falls. Labels are
not used, since by these every model gains that is trained a little longer, whatever its experts are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lewis.merging.fitting.fit import in_order
from lewis.merging.fitting.fitted import Fitted
from lewis.merging.fitting.losses import from_json, to_json
from lewis.merging.prepared import Prepared

logger = logging.getLogger(__name__)
STEP = 0.02
MOST = 5  # steps


@dataclass(frozen=True)
class Length:
    """How long the moves of a fit were made.

    Attributes:
        divergence: on the held-back rows, nats per predicted token, the mean over the experts: that of the fit, then
            that after each step.
        taken: how many steps the moves have been made longer; 0: the fit is kept as it was.
    """

    divergence: tuple[float, ...]
    taken: int

    def to_json(self) -> dict[str, Any]:
        """Return this as plain JSON data."""
        return asdict(self) | {"divergence": [to_json(each) for each in self.divergence]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Length:
        """Read the data that `to_json` returned."""
        return cls(tuple(map(from_json, data["divergence"])), data["taken"])

    def to_text(self) -> str:
        """How long the moves are, in a clause."""
        return (
            f"the moves of the fit are {1 + STEP * self.taken:g} times as long: divergence from the experts "
            f"{self.divergence[0]:.3g}, then {self.divergence[self.taken]:.3g}"
        )


def lengthen(
    merge: Prepared, fitted: Fitted, divergence: float, judge: Callable[[Fitted], float | None]
) -> tuple[Fitted, Length]:
    """Make the moves of the fitted projections longer, step by step, for as long as the divergence falls.

    Args:
        merge: the merge.
        fitted: its fitted tensors.
        divergence: of the model with these tensors.
        judge: gives the divergence of the model with other tensors; None if it may not have them.
    """
    from lewis.importance.measure import network_of

    names = {each.tensor for each in in_order(network_of(merge.base)) if each.tensor in fitted}
    found, taken = [divergence], fitted
    for step in range(1, MOST + 1):
        longer = fitted.longer(merge.base, names, 1 + STEP * step)
        after = judge(longer)
        if after is None:
            break
        found.append(after)
        logger.info("moves %g times as long: divergence %.5f on held-back rows", 1 + STEP * step, after)
        if not found[-1] < found[-2]:
            break
        taken = longer
    return taken, Length(tuple(found), min(range(len(found)), key=found.__getitem__))
