"""What a merge is given of one expert."""

from dataclasses import dataclass

from lewis.allocation.densities import Densities, ScalesByTensor
from lewis.importance.calibration import Calibration
from lewis.models.model import Model


@dataclass(frozen=True)
class Expert:
    """An opened expert.

    Attributes:
        ref: its reference in the recipe, which the settings look its parameters up by.
        model: the opened model.
        densities: if LEWIS guides the merge, its density per tensor.
        calibration: token ids that the merge is fitted to this expert on, if the method fits.
        scales: if it is pruned by activation, what the magnitudes in its task vector are multiplied with before they
            are ranked; tensors that are left out are ranked by magnitude.
        mean_density: the mean of `densities` over the covered tensors, weighted by their parameters.
    """

    ref: str
    model: Model
    densities: Densities | None = None
    scales: ScalesByTensor | None = None
    calibration: Calibration | None = None
    mean_density: float = 1.0
