"""What the parts of a fit in forward order share: the merge, the models, and the passes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lewis.importance.workers import Workers
from lewis.merging.fitting.fitted import Fitted
from lewis.merging.fitting.passes import Pair
from lewis.merging.fitting.spill import Spill
from lewis.merging.prepared import Prepared

if TYPE_CHECKING:
    from lewis.importance.streaming import Weights


@dataclass(frozen=True)
class Shared:
    """What the parts of one fit share.

    Attributes:
        merge: what is fitted.
        pairs: the passes of each expert's batches.
        experts: weights of the experts' models.
        merged: those of the merged model, which reads what is fitted.
        fitted: takes the fitted tensors.
        workers: run the passes and the regressions.
        spill: where large tensors are kept meanwhile.
    """

    merge: Prepared
    pairs: Sequence[Sequence[Pair]]
    experts: Sequence[Weights]
    merged: Weights
    fitted: Fitted
    workers: Workers
    spill: Spill
