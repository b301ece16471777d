"""Make the moves of a fit longer, where that brings the merged model closer to the experts.

A ridge makes a fit's moves W - W_0 too short. So all fitted projections of the blocks become W_0 + c (W - W_0) at once.
Which c is decided by the KL divergence from what each expert predicts on its held-back rows: c rises in steps of `STEP`
for as long as the divergence falls. Labels are not used, since by these every model gains that is trained a little
longer, whatever its experts are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from lewis.merging.fitting.fit import in_order
from lewis.merging.fitting.fitted import Fitted
from lewis.merging.fitting.losses import Course
from lewis.merging.prepared import Prepared

logger = logging.getLogger(__name__)
STEP = 0.02
MOST = 5  # steps


class Length(Course):
    """How long the moves of a fit were made, in steps of `STEP`. Divergences are means over the experts."""

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
    found, taken, result = [divergence], 0, fitted
    for step in range(1, MOST + 1):
        longer = fitted.longer(merge.base, names, 1 + STEP * step)
        after = judge(longer)
        if after is None:
            break
        found.append(after)
        logger.info("moves %g times as long: divergence %.5f on held-back rows", 1 + STEP * step, after)
        if not found[-1] < found[-2]:
            break
        taken, result = step, longer
    return result, Length(tuple(found), taken)
