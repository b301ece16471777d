"""What the compiled merge engine must know of a method, as plain data: the `compiled` argument of `@merge_method`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

NEAREST = np.float32(1e-6)
"""Combine.NEAR divides by at least this (as mergekit does)."""

EnergyWeights = Callable[[Sequence[float]], list[float]]
"""Squared L2 norm of each expert's kept task vector, fp64 -> one weight per expert."""

OwnerWeights = Callable[..., list[float]]
"""For each expert (how many elements it moved, how many of these it alone moved), and the parameters -> its weight."""


class Combine(IntEnum):
    """How the compiled loops combine tensors; the numbers are what `lewis.merging.engine.kernels` is compiled for.

    In all but AVERAGE, tau_i is expert i's task vector after sparsification, w_i its weight, and an element is one
    element of the tensor.

    Attributes:
        SUM: sum_i w_i tau_i, with the parameter `normalize` divided by sum_i w_i.
        ELECT: per element, the sum of the terms w_i tau_i that have the sign of their sum; with the parameter
            `normalize` divided by the weights of these terms (TIES).
        VOTE: as ELECT with `normalize`, but the sign is that of sum_i tau_i, without weights (SCE).
        CLAIM: sum_i w_i tau_i where enough experts claim the element, else 0 (consensus): expert i does if
            |w_i tau_i| > threshold * |sum_j w_j tau_j - w_i tau_i|.
        SHARE: per element, the mean over the experts that moved it by more than the threshold; if only one did, that
            one's change times its weight (RAM).
        NEAR: min(1, threshold / max(|tau|, NEAREST)) * tau of the only expert (NearSwap).
        AVERAGE: sum_i w_i W_i of the models' own weights W_i, with the parameter `normalize` divided by sum_i w_i.
    """

    SUM = 0
    ELECT = 1
    VOTE = 2
    CLAIM = 3
    SHARE = 4
    NEAR = 5
    AVERAGE = 6


@dataclass(frozen=True)
class Loops:
    """Which compiled loops compute the same bytes as a method's function.

    A method without `Loops` (and without `coefficients`) is merged by its function in torch. With them, the engine
    sparsifies each task vector, combines them and adds the result to the base. Some parameters have one meaning in all
    methods and are read if the method has them: `density`, `normalize`, `rescale` (bring each sparsified task vector
    back to its L1 norm) and `lambda` (factor of the merged delta). A method that takes `streams` drops elements at
    random; any other keeps the elements of the largest size. The fields name the parameters with other roles; an empty
    name means that the method has none.

    Attributes:
        combine: how the task vectors, or for AVERAGE the models' weights, become one tensor.
        weight: the parameter with each expert's weight w_i; 1 if the method has no such parameter.
        outliers: the parameter with the fraction of the largest elements that is dropped first.
        rank_width: of a random method, the parameter with half the width of the probabilities by rank
            (`sparsify.drop_by_rank`).
        most_varied: the parameter with the fraction of elements that is kept for all experts alike: those whose
            variance over the experts is largest; 1 keeps all.
        threshold: the parameter that CLAIM, SHARE or NEAR compares with.
        at_least: the parameter with the number of experts that must CLAIM an element.
        weights_by_energy: computes the weights from the energies of what is kept.
        weights_by_owners: computes the weights from how many elements each expert moved by more than the threshold.
    """

    combine: Combine
    weight: str = "weight"
    outliers: str = ""
    rank_width: str = ""
    most_varied: str = ""
    threshold: str = ""
    at_least: str = ""
    weights_by_energy: EnergyWeights | None = None
    weights_by_owners: OwnerWeights | None = None

    @property
    def parameters(self) -> Iterator[str]:
        """The parameters that the method must have."""
        named = (self.outliers, self.rank_width, self.most_varied, self.threshold, self.at_least)
        return (name for name in named if name)
