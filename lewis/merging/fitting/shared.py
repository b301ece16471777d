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
    """What the parts of one fit in forward order share.

    Attributes:
        merge: the merge that is fitted.
        pairs: the passes of each expert's batches.
        experts: weights of the experts' models.
        merged: weights of the merged model, which reads the fitted tensors.
        fitted: takes the fitted tensors.
        workers: run the passes and the regressions.
        spill: keeps large tensors in memory or in files.
    """

    merge: Prepared
    pairs: Sequence[Sequence[Pair]]
    experts: Sequence[Weights]
    merged: Weights
    fitted: Fitted
    workers: Workers
    spill: Spill
